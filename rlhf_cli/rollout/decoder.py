"""A batch of running texts inside a model: prompts are read in, rows go on by one token at a time, rows leave.

Both decoders have the same face:

    admit(prompts)      new rows behind the running ones, one for each prompt
    step(tokens)        tokens (n,) int64, the newest of each row (at first the last of its prompt) -> logits (n, V)
    keep(order)         row i goes on as what was row order[i]; the others are gone

Shapes: n rows, V vocabulary, C columns, P tokens of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rlhf_cli.errors import ModelError
from rlhf_cli.rollout.attention import QUICK_ATTENTION
from rlhf_cli.rollout.cache import Arrival, InPlaceCache

# Tokens of prompts, padding included, that are read in one forward pass, by device. A GPU wants much at a time (at
# hidden 4096 in bf16 the widest activation of a Llama MLP then takes 0.4 GB). A CPU is busy with little, and reading
# prompts of similar length apart saves padding (measured: 4 prompts of 64 cost as much each as 32).
READ_TOKENS = {"cpu": 512, "cuda": 16384}


class Decoder(Protocol):
    """What the sampler needs; see above."""

    can_refill: bool
    device: torch.device

    def admit(self, prompts: Sequence[np.ndarray]) -> None: ...
    def step(self, tokens: Tensor) -> Tensor: ...
    def keep(self, order: np.ndarray) -> None: ...


def open_decoder(model: Any, num_rows: int, num_columns: int) -> Decoder:
    """A decoder for a transformers causal LM; at most num_rows rows of at most num_columns tokens each.

    Raises ModelError when the model keeps no keys and values.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{type(model).__name__} takes no past_key_values, so it would read a text again for each new token;"
            " use a decoder with a key/value cache"
        )
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return InPlaceDecoder(model, num_rows, num_columns)
    return PaddedDecoder(model)


class InPlaceDecoder:
    """Rows in an InPlaceCache; new ones may be admitted while others run."""

    can_refill = True

    def __init__(self, model: Any, num_rows: int, num_columns: int):
        self.model, self.device = model, next(model.parameters()).device
        self.cache = InPlaceCache(model.config.get_text_config().num_hidden_layers, num_rows, num_columns)
        self.starts = np.zeros(0, np.int64)  # (n,) first column of each row
        self._mask_is_final, self._is_masked_plainly = False, _is_masked_plainly(model, num_columns)
        self._device_starts = self._columns = torch.arange(num_columns, device=self.device)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def admit(self, prompts: Sequence[np.ndarray]) -> None:
        """Read all but the last token of prompts (P,); equal ones next to each other are read once."""
        different, sources = _distinct(prompts)
        lengths = np.array([len(p) - 1 for p in different])
        window = self.cache.window
        if not window.num_rows:
            window.first = window.end = int(lengths.max())
        elif window.end < lengths.max():
            self._align(int(lengths.max()))
        for chunk in _similar(lengths, READ_TOKENS.get(self.device.type, READ_TOKENS["cuda"])):
            place = {number: i for i, number in enumerate(chunk.tolist())}
            window.arrivals = [
                Arrival(window.num_rows + i, place[source], int(lengths[source]))
                for i, source in enumerate(sources.tolist())
                if source in place
            ]
            self._read([different[i][:-1] for i in chunk])
        window.arrivals = None
        window.num_rows += len(prompts)
        self._set_starts(np.concatenate([self.starts, window.end - lengths[sources]]))

    def step(self, tokens: Tensor) -> Tensor:
        """One more token for each row (n,) -> logits (n, V) of the next, fp32."""
        window = self.cache.window
        if window.end == window.num_columns:
            self._align(window.end - window.first)
        first, end = window.first, window.end
        mask = self._columns[first : end + 1] >= self._device_starts[:, None]
        inputs: dict[str, Any] = {"position_ids": (end - self._device_starts)[:, None]} if self._takes_positions else {}
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask[:, None, None] if self._mask_is_final else mask,
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        ).logits[:, -1]
        window.end += 1
        return logits.float()

    def keep(self, order: np.ndarray) -> None:
        """Row i goes on as what was row order[i]."""
        self.cache.move_rows([(to, source) for to, source in enumerate(order.tolist()) if to != source])
        self.cache.window.num_rows = len(order)
        self._set_starts(self.starts[order])

    def _read(self, prompts: list[np.ndarray]) -> None:
        """Padded behind, where causal attention does not look, with whatever token; without logits."""
        longest = max(len(p) for p in prompts)
        ids = np.stack([np.pad(p.astype(np.int64), (0, longest - len(p)), mode="edge") for p in prompts])
        self.model.get_decoder()(
            input_ids=torch.from_numpy(ids).to(self.device), past_key_values=self.cache, use_cache=True
        )

    def _align(self, end: int) -> None:
        by = end - self.cache.window.end
        self.cache.align(end)
        self._set_starts(self.starts + by)

    def _set_starts(self, starts: np.ndarray) -> None:
        self.starts, self._device_starts = starts, torch.from_numpy(starts).to(self.device)
        self.cache.window.first = int(starts.min(initial=self.cache.window.end))
        # Where all columns are seen, the fused kernel is quicker without a mask: transformers finds that out by itself,
        # from a mask of two dimensions, at the price of waiting for a GPU.
        is_ragged = self.device.type != "cpu" or bool((starts != self.cache.window.first).any())
        self._mask_is_final = is_ragged and self._is_masked_plainly


class PaddedDecoder:
    """Rows in the cache that transformers makes for the model, padded on the left; for layers that keep other states.

    A state that has read padding would be another one, so all rows of a batch begin together.
    """

    can_refill = False

    def __init__(self, model: Any):
        self.model, self.device = model, next(model.parameters()).device
        self.cache: Any = None
        self._prompts = self._kept = torch.zeros(0, 0, dtype=torch.int64, device=self.device)

    def admit(self, prompts: Sequence[np.ndarray]) -> None:
        """Begin a batch; the one before is over."""
        longest = max(len(p) for p in prompts)
        ids, kept = np.zeros((2, len(prompts), longest), np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :], kept[i, longest - len(prompt) :] = prompt, 1
        self._prompts, self._kept = (torch.from_numpy(x).to(self.device) for x in (ids, kept))
        self.cache = None

    def step(self, tokens: Tensor) -> Tensor:
        """One more token for each row (n,), the first time the whole prompts -> logits (n, V) of the next, fp32."""
        if self.cache is None:
            self.cache, ids = DynamicCache(config=self.model.config), self._prompts
        else:
            ids = tokens[:, None]
            self._kept = torch.cat([self._kept, self._kept.new_ones(len(tokens), 1)], 1)
        positions = (self._kept.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        taken = inspect.signature(self.model.forward).parameters
        logits = self.model(
            input_ids=ids,
            attention_mask=self._kept,
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in taken},
        ).logits[:, -1]
        return logits.float()

    def keep(self, order: np.ndarray) -> None:
        """Row i goes on as what was row order[i]."""
        rows = torch.from_numpy(order).to(self.device)
        self._kept = self._kept[rows]
        self.cache.reorder_cache(rows)


def _is_masked_plainly(model: Any, num_columns: int) -> bool:
    """Whether every layer of a decoder may be given the mask (n, 1, 1, C) of one new token as it is, True = look.

    Otherwise transformers makes the masks, in each step anew, from one of (n, C).
    """
    narrowest = min(
        (layer.sliding_window for layer in DynamicCache(config=model.config).layers if layer.is_sliding),
        default=num_columns,
    )
    is_boolean = model.config._attn_implementation in ("sdpa", QUICK_ATTENTION)
    return bool(model._supports_attention_backend and is_boolean and narrowest >= num_columns)


def _distinct(prompts: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Prompts without those that equal the one before, and for each its number (k,) among them."""
    different: list[np.ndarray] = []
    sources = np.zeros(len(prompts), np.int64)
    for i, prompt in enumerate(prompts):
        if not different or not np.array_equal(prompt, different[-1]):
            different.append(prompt)
        sources[i] = len(different) - 1
    return different, sources


def _similar(lengths: np.ndarray, most_tokens: int) -> Iterator[np.ndarray]:
    """Numbers of the prompts that have tokens to read, those of similar length together, in parts of most_tokens."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    while len(order):
        count = max(1, most_tokens // int(lengths[order[0]]))
        yield order[:count]
        order = order[count:]
