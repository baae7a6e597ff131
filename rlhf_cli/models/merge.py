"""Merging a LoRA adapter: W + scale·B·A in fp32, written tensor by tensor, rows by rows (Hu et al., arXiv 2106.09685).

In memory at a time: the two factors of one tensor, and some rows of it, since rows i..j of a layer become
W[i:j] + scale · B[i:j] · A. Files are read and written from front to back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_cli.errors import ModelError
from rlhf_cli.files import write_json
from rlhf_cli.models.adapter import Adapter
from rlhf_cli.models.merge_base import INDEX, SINGLE, Base, has_tokenizer
from rlhf_cli.models.merge_plan import MergePlan, Target
from rlhf_cli.models.save import make_generation_config
from rlhf_cli.models.tensor_files import StoredTensor, TensorSpec, write_tensors
from rlhf_cli.models.tokenizer import load_tokenizer

PIECE_ELEMENTS = 1 << 22  # of a tensor in work at a time: 16 MiB in fp32
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


class Shard(NamedTuple):
    """A file of weights."""

    file: str
    targets: list[Target]


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9 each) or "2GiB" (2^30)."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT])?(i)?B", text.strip(), re.IGNORECASE)
    assert found, f"{text!r} passed the schema's check"
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** UNITS.get((unit or "").upper(), 0))


def split_shards(targets: list[Target], max_bytes: int) -> list[Shard]:
    """Files of at most max_bytes (one tensor alone may be larger), in the order of the targets, named as transformers
    names them. In each the widest dtype comes first, so that all tensors are aligned."""
    groups: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if groups[-1] and size + target_bytes(target) > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target_bytes(target)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return [
        Shard(name if len(groups) > 1 else SINGLE, sorted(group, key=lambda t: -t.dtype.itemsize))
        for name, group in zip(names, groups, strict=True)
    ]


def target_bytes(target: Target) -> int:
    """Size of a merged tensor in its file."""
    return prod(target.shape) * target.dtype.itemsize


def write_weights(plan: MergePlan, directory: Path, max_shard_bytes: int, progress: Callable[[int], None]) -> int:
    """Write the shards, and their index when there are several. progress(bytes written so far). Returns the shards."""
    shards = split_shards(plan.targets, max_shard_bytes)
    done = 0

    def counted(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += piece.nbytes
            progress(done)

    for shard in shards:
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in shard.targets]
        write_tensors(directory / shard.file, specs, counted(p for t in shard.targets for p in merged_pieces(t)))
    if len(shards) > 1:
        files = {target.name: shard.file for shard in shards for target in shard.targets}
        write_json(
            directory / INDEX,
            {"metadata": {"total_size": done}, "weight_map": dict(sorted(files.items()))},
        )
    return len(shards)


def merged_pieces(target: Target) -> Iterator[Tensor]:
    """The merged tensor, some rows at a time, in its final precision."""
    start, num_rows = target.start, target.shape[0] if target.shape else 1
    step = max(1, PIECE_ELEMENTS // max(1, prod(target.shape[1:])))
    grown = _mean_row(start, step) if num_rows > start.num_rows else None
    low_rank = target.change is not None and target.change.low_rank is not None
    left, right, scale = target.change.factors() if target.change is not None and low_rank else (None, None, 0.0)
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        piece = _start_rows(start, first, last, grown)
        if left is not None and right is not None:
            # At least fp32: a rounded sum is what merging in bf16 gives, and what nobody trained.
            piece = piece.to(torch.promote_types(piece.dtype, torch.float32))
            piece.addmm_(left[first:last].to(piece.dtype), right.to(piece.dtype), alpha=scale)
        yield piece.to(target.dtype)


def _start_rows(start: StoredTensor, first: int, last: int, grown: Tensor | None) -> Tensor:
    """Rows of what the tensor begins as; those past its end are the grown row."""
    old = min(last, start.num_rows)
    piece = start.rows(first, old) if first < old else None
    if old == last and piece is not None:
        return piece
    assert grown is not None
    new = grown.expand(last - max(first, start.num_rows), *grown.shape)
    return new.clone() if piece is None else torch.cat([piece, new])


def _mean_row(start: StoredTensor, step: int) -> Tensor:
    """The mean of the rows, in their own precision: what models.load.grow_embeddings makes of a new token."""
    total = torch.zeros(start.shape[1:], dtype=torch.float64)
    for first in range(0, start.num_rows, step):
        total += start.rows(first, min(first + step, start.num_rows)).double().sum(0)
    return (total / start.num_rows).float().to(start.dtype)


# --- what stands beside the weights


def open_tokenizer(adapter: Adapter, base: Base, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, bool]:
    """The adapter's tokenizer, else the base's; and whether it is the adapter's. ModelError when there is none."""
    own = has_tokenizer(adapter.folder)
    if not own and not has_tokenizer(base.directory):
        raise ModelError(
            f"merge.adapter: neither {adapter.folder} nor the base {base.directory} holds a tokenizer (tokenizer.json),"
            " without which the merged model is of no use; save the tokenizer beside one of them"
        )
    where = adapter.folder if own else base.directory
    return load_tokenizer(where, trust_remote_code=trust_remote_code), own


def write_beside(
    plan: MergePlan, base: Base, tokenizer: PreTrainedTokenizerBase, directory: Path, stop: str | None
) -> None:
    """Config, tokenizer with chat template, and a policy's generation config.

    stop: the template's stop string; if it is one token, generation stops there as at eos.
    """
    config = plan.config
    config.use_cache = True
    for part in (config, config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else part.pad_token_id
        part.eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else part.eos_token_id
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if plan.task == "causal_lm":
        stored = (base.directory / "generation_config.json").is_file()
        of_base = GenerationConfig.from_pretrained(base.directory) if stored else None
        make_generation_config(tokenizer, of_base, stop).save_pretrained(directory)
    if getattr(config, "auto_map", None):  # a model with code of its own, which the user trusted
        for code in base.directory.glob("*.py"):
            (directory / code.name).write_bytes(code.read_bytes())
