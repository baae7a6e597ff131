"""Responses to prompts: batches of rows that begin, grow token by token, end at different lengths, and make room.

What a response says depends on the model, its prompt, `seed` and its `sample` number, and on nothing else: not on the
batch it is in, its order, or the number of ranks (bitwise equal text in fp32 up to rounding of the logits).

Shapes: P tokens of a prompt, T of a response, n rows that run, k steps between two looks at what has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rlhf_cli.models.lora import plain_model
from rlhf_cli.ops.sampling import Draw
from rlhf_cli.rollout.attention import quick_attention
from rlhf_cli.rollout.decoder import open_decoder
from rlhf_cli.rollout.pieces import token_pieces
from rlhf_cli.rollout.rows import Drawing, Rows, Work
from rlhf_cli.rollout.stops import Ending, make_stops, spell
from rlhf_cli.schema.generation import RolloutConfig, SamplingConfig

# With refilling, new rows begin once this share of the batch is free: reading one prompt at a time wastes passes.
REFILL_SHARE = 0.125
# should_stop may ask a file system: once in so many looks at what has ended.
LOOKS_PER_POLL = 8
SAMPLE_BITS = (1 << 64) - 1


class Stopped(Exception):
    """should_stop() said so."""


@dataclass(frozen=True)
class Request:
    """prompt: (P,) int32, P >= 1; sample: 64-bit number that the noise is hashed with, its own for each response."""

    prompt: np.ndarray
    sample: int
    max_new_tokens: int


class Response(NamedTuple):
    """token_ids: (T,) int32, T >= 1, the end token or the tokens of the stop string included.

    text: without the end; num_text_tokens: so many leading token_ids are exactly it, None when the stop string began
    inside a token; ending: eos, stop (string) or length.
    """

    token_ids: np.ndarray
    text: str
    num_text_tokens: int | None
    ending: Ending


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[Request],
    sampling: SamplingConfig | RolloutConfig,
    stop: Sequence[str],
    seed: int,
    *,
    ended: Callable[[int, Response], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Response]:
    """Responses in the order of requests.

    model: a causal LM, plain or with adapters, in evaluation mode with whole weights. A text ends with the tokenizer's
    EOS, any end token of the model's generation config, a string of `stop` or sampling.stop (looked for in the response
    alone), its own max_new_tokens, or the model's last position. A prompt that leaves no position for a new token loses
    its beginning. Before sampling.min_new_tokens no token may be drawn that ends the text, by EOS or by completing a
    stop string.

    ended is called with the number of a request and its response as soon as there is one. Raises Stopped.
    """
    assert not model.training, "dropout would make responses differ"
    if not requests:
        return []
    base = plain_model(model)
    num_positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    prompts = [r.prompt[-(num_positions - 1) :] for r in requests]
    assert all(len(p) for p in prompts)
    limits = np.array(
        [min(r.max_new_tokens, num_positions - len(p)) for r, p in zip(requests, prompts, strict=True)], np.int64
    )
    room = min(sampling.batch_size, len(requests))
    refill = isinstance(sampling, RolloutConfig) and sampling.refill and room < len(requests)
    needed = int((limits + [len(p) - 1 for p in prompts]).max())
    rows = Rows(
        open_decoder(base, room, needed + (needed // 2 if refill else 0)),
        make_stops(
            token_pieces(tokenizer, base.config.get_text_config().vocab_size),
            (*stop, *sampling.stop),
            _end_tokens(base, tokenizer),
        ),
        Drawing(
            Draw(sampling.temperature, sampling.top_k, sampling.top_p),
            sampling.min_new_tokens if isinstance(sampling, RolloutConfig) else 0,
            seed,
        ),
        Work(prompts, limits, np.array([r.sample & SAMPLE_BITS for r in requests], np.uint64)),
    )
    with quick_attention(base):
        responses = _run(rows, starting_order(prompts, limits), room, refill, ended, should_stop)
    return [responses[i] for i in range(len(requests))]


def starting_order(prompts: Sequence[np.ndarray], limits: np.ndarray) -> list[int]:
    """Requests in the order in which they begin: the longest first, so that rows of a batch have similar lengths and
    few are left over at the end; equal prompts next to each other."""
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.tobytes(), []).append(i)
    expected = lambda group: (-int(limits[group].max()), -len(prompts[group[0]]))
    return [i for group in sorted(groups.values(), key=expected) for i in sorted(group, key=lambda i: -limits[i])]


def _run(
    rows: Rows,
    waiting: list[int],
    room: int,
    refill: bool,
    ended: Callable[[int, Response], None] | None,
    should_stop: Callable[[], bool] | None,
) -> dict[int, Response]:
    """Until every request has its response."""
    looks, responses = 0, {}
    while waiting or rows.num_rows:
        free = room - rows.num_rows
        refills = refill and rows.decoder.can_refill and free >= REFILL_SHARE * room
        if waiting and (refills or not rows.num_rows):
            rows.begin(waiting[:free])
            waiting = waiting[free:]
        if should_stop is not None and looks % LOOKS_PER_POLL == 0 and should_stop():
            raise Stopped
        looks += 1
        for request in rows.advance():
            responses[request] = _response(rows, request)
            if ended is not None:
                ended(request, responses[request])
    return responses


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    more = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return frozenset({tokenizer.eos_token_id, *more})


def _response(rows: Rows, request: int) -> Response:
    token_ids = rows.token_ids[request, : rows.lengths[request]].copy()
    ending = rows.stops.ending(int(rows.final_states[request]))
    spelling = spell(rows.stops, token_ids, ending)
    return Response(token_ids, spelling.text, spelling.num_text_tokens, ending)
