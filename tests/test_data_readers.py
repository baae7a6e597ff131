"""Files -> raw rows, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.columns import parse_row_format, render_row
from rlhf_cli.data.readers import open_source, read_rows, source_digest
from rlhf_cli.data.rows import DOCUMENT, Row, RowError
from rlhf_cli.errors import DataError
from rlhf_cli.schema import DataConfig

ROWS = [{"prompt": "a", "response": "b\nc"}, {"prompt": "é", "response": "\u2028 d"}]


def read(path: Path | str, **settings: Any) -> list[Row | RowError]:
    return list(read_rows(DataConfig(path=str(path), **settings), str(path)))


def values(path: Path | str, **settings: Any) -> list[dict[str, Any]]:
    rows = read(path, **settings)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["prompt", "response"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write(path: Path) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        path.write_text(lines, encoding="utf-8")
    elif name == "lmflow.json":
        path.write_text(json.dumps({"type": "text2text", "instances": ROWS}), encoding="utf-8")
    elif name == "older.json":
        path.write_text(json.dumps({"instances": ROWS}), encoding="utf-8")
    elif name == "list.json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif name == "lines.json":
        path.write_text(lines, encoding="utf-8")
    elif name.endswith(".csv"):
        write_csv(path, ",")
    elif name.endswith(".tsv"):
        write_csv(path, "\t")
    elif name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [
        ("a.jsonl", "a.jsonl:2", None),
        ("a.ndjson", "a.ndjson:2", None),
        ("a.jsonl.gz", "a.jsonl.gz:2", None),
        ("lmflow.json", "lmflow.json instance 2", "text2text"),
        ("lmflow.json.gz", "lmflow.json.gz instance 2", "text2text"),
        ("older.json", "older.json instance 2", None),
        ("list.json", "list.json instance 2", None),
        ("lines.json", "lines.json:2", None),
        ("a.csv", "a.csv:4", None),  # row 1 takes lines 2 and 3
        ("a.tsv", "a.tsv:4", None),
        ("a.csv.gz", "a.csv.gz:4", None),
        ("a.parquet", "a.parquet row 2", None),
    ],
)
def test_each_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, source: str, kind: str | None) -> None:
    path = write(tmp_path / name)
    assert values(path) == ROWS
    last = read(path)[-1]
    assert isinstance(last, Row)
    assert last.source == str(tmp_path / source)
    assert last.kind == kind


def test_txt_is_one_document_with_plain_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nthree")
    assert read(path) == [Row({"text": "one\ntwo\n\nthree"}, str(path), DOCUMENT)]


def test_bom_crlf_and_blank_lines_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}')
    assert values(path) == [{"text": "x"}, {"text": "y"}]


def test_bom_in_csv_and_long_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ufefftext\r\n" + "x" * 200_000 + "\r\n", encoding="utf-8")
    assert values(path) == [{"text": "x" * 200_000}]


def test_directory_and_glob_are_sorted(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    assert [v["text"] for v in values(tmp_path)] == ["a", "b", "c"]
    assert [v["text"] for v in values(tmp_path / "[bc].jsonl")] == ["b", "c"]


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "reason", "detail"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "not valid JSON", ":2:"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "not an object", '["y"]'),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "not UTF-8", "0xe9"),
        ("a.csv", b"text,label\nx,1\ny\n", "wrong number of fields", "1 for 2 columns"),
        ("a.csv", b'text,label\n"x\nx",1\n"y\ny\ny"\n', "wrong number of fields", "a.csv:4: "),
        ("a.jsonl", b'{"text": "x"}\n{"text": ' + DEEP + b"}\n", "nested too deeply", ":2:"),
        ("a.json", b'{"text": "x"}\n' + DEEP + b"\n", "nested too deeply", ":2:"),
        ("a.json", b'[{"text": "x"}, 3]', "not an object", "instance 2"),
    ],
)
def test_a_bad_row_comes_as_error_with_its_place(
    tmp_path: Path, name: str, content: bytes, reason: str, detail: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    good, bad = read(path)
    assert isinstance(good, Row)
    assert isinstance(bad, RowError)
    assert bad.reason == reason
    assert detail in str(bad)
    assert name in str(bad)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b'{"text": "x"}', "got an object with the keys text"),
        ("a.json", b'{"type": 3, "instances": []}', '"type" is 3'),
        ("a.json", b'[{"text": "x"},\n{"text" "y"}]', "a.json:2: not valid JSON"),
        ("a.json", b'[{"text":\n"\xe9"}]', "a.json:2: not UTF-8"),
        ("a.json", DEEP, "nested more deeply than Python reads"),
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"one\ntwo\xff", "a.txt:2: not UTF-8"),
        ("a.txt", "x".encode("utf-16"), "is UTF-16"),
        ("a.csv", b"", "must name the columns"),
        ("a.csv", b"text,text\nx,y\n", "must be there and differ"),
        ("a.csv", b"text\n\xe9\n", "not UTF-8"),
        ("a.csv", b'text\n"x\n', "cannot be read on"),
        ("a.csv", b"text\n", "no rows"),
        ("a.parquet", b"PAR?", "cannot be read as parquet"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-30], "cannot be read"),
        ("a.doc", b"x", "unknown kind of file; readable are .json"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert words in str(caught.value)
    assert name in str(caught.value)


def test_what_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    data = DataConfig()
    with pytest.raises(DataError, match=r"does not exist; .* holds empty, train\.jsonl"):
        open_source(data, str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="no file matches"):
        open_source(data, str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match="holds no data file"):
        open_source(data, str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="empty/train does not exist"):  # and no try at the hub
        open_source(data, "empty/train")


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str, config: str | None, *, split: str) -> None:
        assert (name, config, split) == ("org/name", "config", "train[:5]")
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/name:config is no local file.*offline"):
        open_source(DataConfig(split="train[:5]"), "org/name:config")


def test_a_hub_data_set_gives_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write(tmp_path / "a.jsonl")
    table = datasets.Dataset.from_json(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: table)
    assert values("org/name") == ROWS
    assert read("org/name")[1].source == "org/name row 2"
    source = open_source(DataConfig(), "org/name")
    assert source_digest(source) == source_digest(source)


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}')
    before = source_digest(open_source(DataConfig(), str(path)))
    stat = path.stat()
    path.write_text('{"text": "y"}')
    import os

    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_digest(open_source(DataConfig(), str(path))) != before
    path.write_text('{"text": "x"}')
    moved = path.rename(tmp_path / "b.jsonl")
    assert source_digest(open_source(DataConfig(), str(moved))) == before


def test_columns_rename_and_swap(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    swapped = values(path, columns={"prompt": "response", "response": "prompt"})
    assert swapped == [{"prompt": row["response"], "response": row["prompt"]} for row in ROWS]
    assert values(path, columns={"text": "prompt"})[0] == {"response": "b\nc", "text": "a"}


def test_an_unknown_column_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no column 'question'; its columns are prompt, response"):
        values(write(tmp_path / "a.jsonl"), columns={"prompt": "question"})


def test_row_format_is_plain_text_substitution() -> None:
    parts = parse_row_format("{{{prompt}}} -> {label}\n")
    assert render_row(parts, {"prompt": "{x.__class__}", "label": 1}, "a:1") == "{{x.__class__}} -> 1\n"


@pytest.mark.parametrize("row_format", ["plain", "{}", "{a!r}", "{a:>9}", "{a", "a}"])
def test_row_format_refuses_all_but_names(row_format: str) -> None:
    with pytest.raises(DataError, match=r"data\.row_format"):
        parse_row_format(row_format)


def test_row_format_cannot_reach_attributes_or_missing_columns() -> None:
    with pytest.raises(RowError, match=r"no column 'prompt.__class__'"):
        render_row(parse_row_format("{prompt.__class__}"), {"prompt": "x"}, "a:1")
    with pytest.raises(RowError, match="is no text"):
        render_row(parse_row_format("{prompt}"), {"prompt": None}, "a:1")
