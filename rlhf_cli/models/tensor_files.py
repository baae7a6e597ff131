"""Safetensors files read and written piece by piece, so that no tensor need ever be whole in memory.

Plain reads instead of a memory map, whose pages count as memory of this process until the kernel wants them back.
The format: 8 bytes with the length of a JSON header, the header (dtype, shape and place of each tensor), the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_cli.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read row by row. rows(start, stop): that part of the first dimension, as a new tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def num_rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.num_rows)


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file, without the header."""
        return prod(self.shape) * self.dtype.itemsize


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file, in the order of their bytes. Raises ModelError for a damaged file."""
    try:
        # The library checks the header: sizes, overlaps, holes, the end of the file.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}); copy or download it again") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                f"{path}: {name} is stored as {entry['dtype']}, which is not a precision that can be merged;"
                f" allowed: {', '.join(DTYPES)}"
            )
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        found[name] = StoredTensor(shape, dtype, _reader(path, 8 + length + entry["data_offsets"][0], shape, dtype))
    return found


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors that are there already, in the same form."""
    return {name: StoredTensor(tuple(t.shape), t.dtype, _slicer(t)) for name, t in tensors.items()}


def write_tensors(path: Path, specs: Sequence[TensorSpec], pieces: Iterable[Tensor]) -> None:
    """Write a safetensors file. pieces: the data of all specs one after the other, in as many parts as one likes.

    The widest dtype comes first in `specs`, so that every tensor is aligned to its own.
    """
    widths = [spec.dtype.itemsize for spec in specs]
    assert widths == sorted(widths, reverse=True), "unaligned tensors cannot be mapped by readers"
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            written += file.write(_as_bytes(piece.contiguous()))
    assert written == end, f"{written} bytes for {end} in {path.name}"


def _reader(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[int, int], Tensor]:
    row_bytes = prod(shape[1:]) * dtype.itemsize

    def rows(first: int, last: int) -> Tensor:
        raw = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            file.seek(start + first * row_bytes)
            _fill(_as_bytes(raw), file.readinto, path)
        return raw.view(dtype).view((last - first, *shape[1:]) if shape else ())

    return rows


def _fill(target: memoryview, readinto: Callable[[memoryview], int], path: Path) -> None:
    """Read until `target` is full: one read gives at most 2 GiB (read(2))."""
    while len(target):
        count = readinto(target)
        if not count:
            raise ModelError(f"{path} became shorter while it was read; leave the model alone until the merge is done")
        target = target[count:]


def _slicer(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: tensor[first:last].clone() if tensor.ndim else tensor.clone()


def _as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
