"""prepare(): splits, counts, weights, cache."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cli.data import cache, dataset
from rlhf_cli.data.dataset import Prepared, prepare
from rlhf_cli.data.rows import TextRow, row_digest
from rlhf_cli.data.stream import eval_count, train_texts
from rlhf_cli.data.templates import TEMPLATES, Template
from rlhf_cli.data.token_rows import TokenRows, repeats_from_weights
from rlhf_cli.errors import DataError
from rlhf_cli.schema import DataConfig, FilterConfig
from tests.data_tokenizers import byte_bpe

TOKENIZER = byte_bpe()
Run = Callable[..., Prepared]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(
        path: Any, template: Template = TEMPLATES["none"], tokenizer_digest: str = "t", report: Any = None, **keys: Any
    ) -> Prepared:
        paths = [str(p) for p in path] if isinstance(path, list) else str(path)
        data = DataConfig(path=paths, cache_dir=str(tmp_path / "cache"), **keys)
        return prepare(data, TOKENIZER, tokenizer_digest, template, report or (lambda line: None))

    return run


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(rows: TokenRows | None) -> list[str]:
    assert rows is not None
    return [TOKENIZER.decode(rows.row(i).input_ids).removesuffix("<|end|>") for i in range(len(rows))]


def test_rows_and_counts(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two", "", "one"])
    lines: list[str] = []
    found = run(path, deduplicate=True, report=lines.append)
    assert texts(found.train) == ["one", "two"]
    assert found.eval is None
    assert found.train.row(0).trained.tolist() == [False] + [True] * (len(found.train.row(0).trained) - 1)
    lengths = found.train.lengths
    assert lengths.tolist() == [len(found.train.row(i).input_ids) for i in range(2)]
    assert found.train.num_trained([0, 1]) == lengths.sum() - 2  # all but the first token of each
    assert found.train.row_digests.tolist() == [row_digest(TextRow("one")), row_digest(TextRow("two"))]
    (info,) = found.info
    assert info["path"] == str(path)
    assert (info["rows"], info["kept"], info["dropped"]) == (4, 2, {"empty": 1, "duplicate": 1})
    assert (info["tokens"], info["trained_tokens"]) == (lengths.sum(), lengths.sum() - 2)
    assert info["formats"] == ["text_only"]
    assert any("2 of 4 rows" in line and "duplicate: 1" in line for line in lines)


@pytest.mark.parametrize(
    ("rows", "percentage", "expected"), [(30, 10, 3), (31, 10, 4), (5, 0.1, 1), (1000, 0.1, 1), (3, 0, 0), (7, 99, 7)]
)
def test_eval_count_rounds_up_exactly(rows: int, percentage: float, expected: int) -> None:
    assert eval_count(rows, percentage) == expected


def test_the_split_is_the_last_rows_of_all_paths(run: Run, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", ["a", "b", "c"]), write(tmp_path / "b.jsonl", ["d", "", "e"])]
    found = run(paths, validation_split_percentage=30)  # 30 % of the 5 rows that are left: 1.5, so 2
    assert (texts(found.train), texts(found.eval)) == (["a", "b", "c"], ["d", "e"])
    assert [i["kept"] for i in found.info] == [3, 2]


def test_the_split_comes_before_overlong_rows_go(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b", "c", "long " * 50, "d"])
    found = run(path, validation_split_percentage=40, max_length=20, overlong="drop")
    assert (texts(found.train), texts(found.eval)) == (["a", "b", "c"], ["d"])
    assert found.info[0]["dropped"] == {"overlong": 1}


def test_limit_comes_first(run: Run, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", ["", "b", "c"]), write(tmp_path / "b.jsonl", ["d", "e"])]
    found = run(paths, limit=4, validation_split_percentage=1)
    assert (texts(found.train), texts(found.eval)) == (["b", "c"], ["d"])
    assert [i["rows"] for i in found.info] == [3, 1]


def test_a_lone_txt_is_cut_at_a_line_break(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("Say it.\nIt is so.\nA floor.\nA room.\n")  # 8 + 10 + 9 + 8 = 35 characters
    # 25 % = 8.75, so 9 for evaluation: the boundary is 26, the last line break before it ends line 2
    found = run(path, validation_split_percentage=25)
    assert texts(found.train) == ["Say it.\nIt is so.\n"]
    assert texts(found.eval) == ["A floor.\nA room.\n"]
    assert (found.info[0]["rows"], found.info[0]["kept"]) == (1, 1)
    data = DataConfig(path=str(path), validation_split_percentage=25)
    assert list(train_texts(data, TEMPLATES["none"])) == ["Say it.\nIt is so.\n"]


def test_two_txt_are_two_rows(run: Run, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n{name}\n")
    found = run([tmp_path / "a.txt", tmp_path / "b.txt"], validation_split_percentage=1)
    assert (texts(found.train), texts(found.eval)) == (["a\na\n"], ["b\nb\n"])


def test_windows_of_a_txt_put_together_are_the_text(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("Say it, it is so.\n" * 40)
    found = run(path, max_length=16)
    rows = [found.train.row(i).input_ids for i in range(len(found.train))]
    assert len(rows) > 10
    joined = np.concatenate([rows[0], *(ids[1:] for ids in rows[1:])])
    assert TOKENIZER.decode(joined) == path.read_text() + "<|end|>"
    assert len(set(found.train.row_digests.tolist())) == 1
    assert found.info[0]["overlong"] == {"split": 1}


def test_eval_path(run: Run, tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "a.jsonl", ["a", "b"]), write(tmp_path / "b.jsonl", ["c", "d"])
    found = run(train, eval_path=str(evaluation), weights=[2.0])
    assert (texts(found.train), texts(found.eval)) == (["a", "b"], ["c", "d"])
    assert found.train.repeats.tolist() == [2, 2]
    assert found.eval is not None
    assert found.eval.repeats.tolist() == [1, 1]
    assert [i["path"] for i in found.info] == [str(train), str(evaluation)]


def test_weights_act_per_path_on_the_training_side(run: Run, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.jsonl", [f"a {i}" for i in range(400)]),
        write(tmp_path / "b.jsonl", [f"b {i}" for i in range(400)]),
    ]
    found = run(paths, weights=[0.5, 1.5], validation_split_percentage=25)
    repeats = found.train.repeats
    assert len(repeats) == 600
    assert set(repeats[:400]) == {0, 1}
    assert set(repeats[400:]) == {1, 2}
    # binomial, n = 400 and p = 1/2: 200 with a standard deviation of 10; 5 of them are 50
    assert 150 < repeats[:400].sum() < 250
    assert 240 < repeats[400:].sum() < 360  # n = 200: 300 ± 7.1, wider than 8 of them
    assert found.eval is not None
    assert found.eval.repeats.tolist() == [1] * 200
    again = run(paths[::-1], weights=[1.5, 0.5], validation_split_percentage=25)
    chosen = {int(d) for d, n in zip(found.train.row_digests, repeats, strict=True) if n == 0}
    other = dict(zip(again.train.row_digests.tolist(), again.train.repeats.tolist(), strict=True))
    assert all(other[d] == 0 for d in chosen if d in other)  # the place of a row does not matter


def test_windows_of_one_row_are_weighted_one_by_one() -> None:
    rows = np.repeat(np.arange(2), 500)
    repeats = repeats_from_weights(np.full(1000, 0.5), rows.astype(np.uint64) + np.uint64(7), rows)
    assert 175 < repeats[:500].sum() < 325  # 250 ± 11
    assert 175 < repeats[500:].sum() < 325
    assert repeats[:500].tolist() != repeats[500:].tolist()


def test_bad_rows_stop_the_run_or_are_counted(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n{"text": 5}\n[1]\n{"text": null}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON.*data\.on_bad_row=skip"):
        run(path)
    found = run(path, on_bad_row="skip")
    assert texts(found.train) == ["a", "b"]
    assert found.info[0]["dropped"] == {
        "not valid JSON": 1,
        "field 'text' is no text": 1,
        "not an object": 1,
        "field 'text' is null": 1,
    }


def test_a_dialogue_that_the_template_refuses_is_a_bad_row(run: Run, tmp_path: Path) -> None:
    jinja = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a", "system": "s"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = Template("tokenizer", jinja)
    with pytest.raises(DataError, match=r"a\.jsonl:2: refused by the chat template"):
        run(path, template)
    assert run(path, template, on_bad_row="skip").info[0]["dropped"] == {"refused by the chat template": 1}


def test_nothing_left_lists_the_reasons(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["long " * 50, ""])
    with pytest.raises(DataError, match=r"nothing is left to train on; of 2 rows .*overlong: 1.*data\.max_length=8"):
        run(path, max_length=8, overlong="drop")
    with pytest.raises(DataError, match=r"nothing is left to train on"):
        run(write(tmp_path / "b.jsonl", ["x"]), validation_split_percentage=1)
    path = write(tmp_path / "c.jsonl", ["x", "long " * 50])
    with pytest.raises(DataError, match=r"nothing is left to evaluate on; of 2 rows overlong: 1"):
        run(path, validation_split_percentage=1, max_length=8, overlong="drop")


def test_hh_pairs_train_the_last_reply(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    start = "\n\nHuman: Say it.\n\nAssistant: It is so.\n\nHuman: How?\n\nAssistant: "
    path.write_text(json.dumps({"chosen": start + "I found a floor.", "rejected": start + "A room."}))
    ids, trained = run(path, TEMPLATES["hh"]).train.row(0)
    context = "###Human: Say it.###Assistant: It is so.###Human: How?###Assistant:"
    assert TOKENIZER.decode(ids[~trained]) == context
    assert TOKENIZER.decode(ids[trained]) == " I found a floor.<|end|>"


def test_train_texts_leave_the_evaluation_split_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b", "", "c"])
    assert list(train_texts(DataConfig(path=str(path)), TEMPLATES["none"])) == ["a", "b", "c"]
    assert list(train_texts(DataConfig(path=str(path), validation_split_percentage=10), TEMPLATES["none"])) == [
        "a",
        "b",
    ]


def test_chunks_do_not_change_the_tokens(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [f"It is so {i}. " * (i % 7 + 1) for i in range(50)])
    whole = run(path, max_length=16)
    monkeypatch.setattr(dataset, "CHUNK_ROWS", 3)
    monkeypatch.setattr(dataset, "CACHE_VERSION", -1)
    seen: list[int] = []
    data = DataConfig(path=str(path), max_length=16, cache_dir=str(tmp_path / "cache"))
    chunked = prepare(data, TOKENIZER, "t", TEMPLATES["none"], lambda line: None, lambda done, total: seen.append(done))
    assert chunked.digest != whole.digest
    assert chunked.train.offsets.tolist() == whole.train.offsets.tolist()
    assert chunked.train.input_ids.tolist() == whole.train.input_ids.tolist()
    assert chunked.train.row_digests.tolist() == whole.train.row_digests.tolist()
    assert seen == [*range(3, 51, 3), 50]


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    built: list[Path] = []
    real = cache.build_entry

    def build(entry: Path, write: Any) -> None:
        built.append(entry)
        real(entry, write)

    monkeypatch.setattr(cache, "build_entry", build)
    return built


def test_the_cache_is_found_again_and_follows_what_matters(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two", "three", "four"])
    built = count_builds(monkeypatch)
    first = run(path)
    lines: list[str] = []
    again = run(path, packing=True, weights=[2.0], report=lines.append)
    assert len(built) == 1
    assert "from the cache" in lines[0]
    assert again.info == first.info
    moved = path.rename(tmp_path / "b.jsonl")
    assert run(moved).info[0]["path"] == str(moved)
    assert len(built) == 1
    changes: list[dict[str, Any]] = [
        {"max_length": 100},
        {"overlong": "drop"},
        {"loss_on": "all"},
        {"limit": 3},
        {"deduplicate": True},
        {"filters": FilterConfig(max_line_length=99)},
        {"validation_split_percentage": 25.0},
        {"tokenizer_digest": "u"},
        {"template": TEMPLATES["hh"]},
        {"row_format": "{text}"},
        {"columns": {"text": "text"}},
        {"on_bad_row": "skip"},
    ]
    for number, change in enumerate(changes, start=2):
        run(moved, **change)
        assert len(built) == number, change
    write(moved, ["one", "two", "three", "five"])
    assert texts(run(moved).train)[-1] == "five"
    assert len(set(built)) == len(changes) + 2


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "info", "list", "no info"])
def test_a_damaged_cache_is_built_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    entry = tmp_path / "cache" / run(path).digest
    ids = entry / "train" / "input_ids.npy"
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "flip":
        content = bytearray(ids.read_bytes())
        content[-1] ^= 1
        ids.write_bytes(content)
    elif damage == "missing":
        ids.unlink()
    elif damage == "info":
        (entry / cache.INFO).write_text('{"info": {')
    elif damage == "list":
        (entry / cache.INFO).write_text("[]")
    else:
        (entry / cache.INFO).unlink()
    built = count_builds(monkeypatch)
    assert texts(run(path).train) == ["one", "two"]
    assert len(built) == 1
    assert texts(run(path).train) == ["one", "two"]
    assert len(built) == 1


def test_what_a_killed_process_left_is_removed(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one"])
    digest = run(path).digest
    entry = tmp_path / "cache" / digest
    process = subprocess.Popen(["true"])
    process.wait()
    abandoned = entry.with_name(f"{digest}.tmp-{socket.gethostname()}-{process.pid}")
    abandoned.mkdir()
    (entry / cache.INFO).unlink()
    run(path)
    assert [p.name for p in entry.parent.iterdir()] == [digest]


def test_a_failed_build_leaves_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(DataError):
        run(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_first_complete_entry_stays(tmp_path: Path) -> None:
    """Another process finishes while this one builds."""
    entry = tmp_path / "cache" / "digest"

    def write_one(value: int) -> Callable[[Path], dict[str, Any]]:
        def write(folder: Path) -> dict[str, Any]:
            writer = cache.ColumnWriter(folder / "train" / "input_ids.npy", np.dtype(np.int32))
            writer.append(np.array([value]))
            writer.close()
            return {"value": value}

        return write

    def slow(folder: Path) -> dict[str, Any]:
        other = tmp_path / "other" / "digest"
        cache.build_entry(other, write_one(1))
        other.rename(entry)
        return write_one(2)(folder)

    cache.build_entry(entry, slow)
    found = cache.load_entry(entry)
    assert found is not None
    assert found[0] == {"value": 1}
    assert found[1]["train"]["input_ids"].tolist() == [1]
    assert [p.name for p in entry.parent.iterdir()] == ["digest"]


def test_column_writer_makes_plain_npy(tmp_path: Path) -> None:
    writer = cache.ColumnWriter(tmp_path / "x" / "a.npy", np.dtype(np.int64))
    for start in range(0, 5000, 1000):
        writer.append(np.arange(start, start + 1000))
    writer.close()
    assert np.load(tmp_path / "x" / "a.npy").tolist() == list(range(5000))


def test_a_cache_that_cannot_be_written_says_where(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be kept in .*cache: .*set data\.cache_dir or \$RLHF_CACHE"):
        run(write(tmp_path / "a.jsonl", ["one"]))


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    assert cache.cache_root(None) == tmp_path
    assert cache.cache_root("~/x") == Path.home() / "x"
    monkeypatch.delenv("RLHF_CACHE")
    assert cache.cache_root(None) == Path.home() / ".cache" / "rlhf"
