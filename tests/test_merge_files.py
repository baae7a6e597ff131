"""Safetensors written piece by piece, shards, and sizes as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlhf_cli.errors import ModelError
from rlhf_cli.models.merge import parse_size, split_shards, target_bytes
from rlhf_cli.models.merge_plan import Target
from rlhf_cli.models.tensor_files import TensorSpec, in_memory, stored_tensors, write_tensors

TENSORS = {
    "double": torch.arange(3, dtype=torch.float64),
    "matrix": torch.arange(15, dtype=torch.float32).view(5, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "half": torch.tensor([[0.5, -1.0], [2.0, 3.0]], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    stored = stored_tensors(tmp_path / "a.safetensors")
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].nbytes == tensor.nbytes
        assert torch.equal(stored[name].read(), tensor)
    assert torch.equal(stored["matrix"].rows(1, 3), torch.tensor([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]))


def test_the_library_reads_what_was_written_in_pieces(tmp_path: Path) -> None:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()]
    pieces = [part for t in TENSORS.values() for part in (t.split(2) if t.ndim else [t])]
    write_tensors(tmp_path / "b.safetensors", specs, pieces)
    loaded = load_file(tmp_path / "b.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in TENSORS.items())


def test_pieces_that_do_not_fill_the_file_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="8 bytes for 12"):
        write_tensors(tmp_path / "c.safetensors", [TensorSpec("x", torch.float32, (3,))], [torch.zeros(2)])


def test_a_damaged_file_and_a_strange_precision_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"d\.safetensors is damaged .*copy or download it again"):
        stored_tensors(path)
    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ModelError, match="w is stored as F8_E4M3"):
        stored_tensors(path)


def test_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "500MB": 5 * 10**8, "2GiB": 2 * 2**30, "1.5 kb": 1500, "10B": 10, "1TB": 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes


def target(name: str, elements: int, dtype: torch.dtype = torch.float32) -> Target:
    tensor = in_memory({name: torch.zeros(elements, dtype=dtype)})[name]
    return Target(name, tensor, None, (elements,), dtype)


def test_shards_by_hand() -> None:
    # 40 + 40 bytes fit into 80; 60 does not fit beside them; 200 is alone in its file whatever the limit.
    shards = split_shards([target("a", 10), target("b", 10), target("c", 15), target("d", 50), target("e", 1)], 80)
    assert [(s.file, [t.name for t in s.targets]) for s in shards] == [
        ("model-00001-of-00004.safetensors", ["a", "b"]),
        ("model-00002-of-00004.safetensors", ["c"]),
        ("model-00003-of-00004.safetensors", ["d"]),
        ("model-00004-of-00004.safetensors", ["e"]),
    ]
    assert [s.file for s in split_shards([target("a", 10)], 80)] == ["model.safetensors"]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))), st.data()
)
def test_shards_hold_everything_once_within_the_limit(
    sizes: list[tuple[int, torch.dtype]], data: st.DataObject
) -> None:
    targets = [target(str(i), n, dtype) for i, (n, dtype) in enumerate(sizes)]
    limit = data.draw(st.integers(1, 200))
    shards = split_shards(targets, limit)
    assert sorted(int(t.name) for s in shards for t in s.targets) == list(range(len(targets)))
    for shard in shards:
        assert len(shard.targets) <= 1 or sum(map(target_bytes, shard.targets)) <= limit
        widths = [t.dtype.itemsize for t in shard.targets]
        assert widths == sorted(widths, reverse=True)
