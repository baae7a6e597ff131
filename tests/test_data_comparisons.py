"""prepare_comparisons(): texts, drops, splits, labels, cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data import cache, comparisons
from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.data.comparison_stream import comparison_texts, label_order, stratified_draw
from rlhf_cli.data.comparisons import PreparedComparisons, prepare_comparisons
from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.rows import DialogueRow, Message, TextRow, row_digest
from rlhf_cli.data.stream import eval_count
from rlhf_cli.data.templates import TEMPLATES, Template
from rlhf_cli.data.tokenize import encode_prompt, make_encoder
from rlhf_cli.errors import DataError
from rlhf_cli.schema import ComparisonDataConfig, DataConfig
from tests.data_tokenizers import byte_bpe, sentencepiece_like

TOKENIZER = byte_bpe()
EOS = "<|end|>"
HH = "\n\nHuman: Say it.\n\nAssistant: It is so.\n\nHuman: How?\n\nAssistant: "
Run = Callable[..., PreparedComparisons]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(
        path: Any,
        template: Template = TEMPLATES["none"],
        tokenizer: Any = TOKENIZER,
        tokenizer_digest: str = "t",
        report: Callable[[str], None] = lambda line: None,
        **keys: Any,
    ) -> PreparedComparisons:
        paths = [str(p) for p in path] if isinstance(path, list) else str(path)
        data = ComparisonDataConfig(path=paths, cache_dir=str(tmp_path / "cache"), **keys)
        return prepare_comparisons(data, tokenizer, tokenizer_digest, template, report)

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(*sides: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides]


def labelled(*rows: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in rows]


def texts(rows: ComparisonRows | None) -> list[list[str]]:
    """The texts of each group, without EOS; every sequence must have it."""
    assert rows is not None
    found = []
    for group in range(len(rows)):
        whole = [TOKENIZER.decode(rows.ids(sequence)) for sequence in rows.sequences(group)]
        assert all(text.endswith(EOS) for text in whole)
        found.append([text.removesuffix(EOS) for text in whole])
    return found


def test_raw_pairs_are_their_text_and_nothing_else(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"positive": "good", "negative": "bad one"}, *pairs((" x", "y\n"))])
    lines: list[str] = []
    found = run(path, TEMPLATES["hh"], report=lines.append)
    assert (found.kind, found.labels, found.eval, len(found.train)) == ("pairs", (), None, 2)
    assert texts(found.train) == [["good", "bad one"], [" x", "y\n"]]
    rows = found.train
    assert rows.ranks.tolist() == [0, 1, 0, 1]
    assert (rows.margins.tolist(), rows.labels.tolist(), rows.counts.tolist()) == ([0, 0], [-1, -1], [2, 2])
    assert rows.lengths.tolist() == [len(rows.ids(s)) for s in range(4)]
    assert rows.longest.tolist() == [max(rows.lengths[:2]), max(rows.lengths[2:])]
    assert rows.tokens(np.array([1])) == rows.lengths[2:].sum()
    assert rows.sequence_digests.tolist() == [row_digest(TextRow(t)) for t in ("good", "bad one", " x", "y\n")]
    (info,) = found.info
    assert (info["path"], info["formats"], info["rows"], info["kept"]) == (str(path), ["paired"], 2, 2)
    assert (info["sequences"], info["tokens"]) == (4, rows.lengths.sum())
    assert "trained_tokens" not in info
    assert any("2 of 2 rows, 4 sequences" in line and "trained" not in line for line in lines)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentencepiece_like()], ids=["bytes", "sentencepiece"])
def test_a_pair_with_a_prompt_has_the_tokens_of_sft(run: Run, tmp_path: Path, name: str, tokenizer: Any) -> None:
    """Chosen sides are what sft trains on, token by token and digest by digest; prompts are those of generation."""
    rows: list[dict[str, Any]] = [
        {"prompt": "How do I do it?", "chosen": " a floor", "rejected": "b", "margin": 0.5, "system": "Be brief."},
        {"chosen": HH + "I found it.", "rejected": HH + "No.\n\nHuman: Oh.\n\nAssistant: x"},
        {"prompt": "q", "chosen": "a" * 30, "rejected": "b"},
    ]
    path = write(tmp_path / "a.jsonl", [rows[0], rows[2]])
    hh = write(tmp_path / "hh.jsonl", [rows[1]])
    found = run([path, hh], TEMPLATES[name], tokenizer)
    data = DataConfig(path=[str(path), str(hh)], cache_dir=str(tmp_path / "cache"))
    sft = prepare(data, tokenizer, "t", TEMPLATES[name], lambda line: None).train
    chosen = [found.train.sequences(g)[0] for g in range(3)]
    assert [found.train.ids(s).tolist() for s in chosen] == [sft.row(i).input_ids.tolist() for i in range(3)]
    assert found.train.sequence_digests[chosen].tolist() == sft.row_digests.tolist()
    rejected = DialogueRow(
        (Message("system", "Be brief."), Message("user", "How do I do it?"), Message("assistant", "b"))
    )
    assert found.train.sequence_digests[1] == row_digest(rejected)
    prompt = encode_prompt(make_encoder(tokenizer), TEMPLATES[name], rejected.messages[:2])
    for sequence in found.train.sequences(0):
        assert found.train.ids(sequence)[: len(prompt)].tolist() == prompt.tolist()
    assert found.train.margins.tolist() == [0.5, 0, 0]
    assert found.train.sources.tolist() == [0, 0, 1]


def test_rankings(run: Run, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [3, 1.5]},
    ]
    found = run(write(tmp_path / "a.jsonl", rows), TEMPLATES["hh"])
    assert found.kind == "rankings"
    assert texts(found.train) == [
        ["###Human: q###Assistant: a", "###Human: q###Assistant: b", "###Human: q###Assistant: c"],
        ["###Human: q###Assistant: a", "###Human: q###Assistant: b"],
    ]
    assert found.train.ranks.tolist() == [2, 1, 2, 3, 1.5]  # one answer scores higher than each 0.5
    assert found.train.counts.tolist() == [3, 2]
    assert found.train.sequence_digests[0] == found.train.sequence_digests[3]


def test_labels_are_named_in_order(run: Run, tmp_path: Path) -> None:
    rows = [{"sample": "It is so.", "sentiment": "sad"}, {"sample": "A floor.", "sentiment": "happy"}]
    lines: list[str] = []
    found = run(write(tmp_path / "a.jsonl", rows), TEMPLATES["hh"], report=lines.append)
    assert (found.kind, found.labels) == ("labels", ("happy", "sad"))
    assert texts(found.train) == [["It is so."], ["A floor."]]  # raw text, no template
    assert found.train.labels.tolist() == [1, 0]
    assert found.train.ranks.tolist() == [0, 0]
    assert "data: label sad: 1 rows to train on" in lines
    # numbers by value; true and 1 are one label; names come from the evaluation rows, too
    train = write(tmp_path / "b.jsonl", labelled(("a", 10), ("b", 2), ("c", True), ("d", "2")))
    evaluation = write(tmp_path / "c.jsonl", labelled(("e", 1), ("f", 7)))
    found = run(train, eval_path=str(evaluation), report=lines.append)
    assert found.labels == ("1", "2", "7", "10")
    assert found.train.labels.tolist() == [3, 1, 0, 1]
    assert found.eval is not None
    assert found.eval.labels.tolist() == [0, 2]
    assert "data: label 7: 0 rows to train on, 1 to evaluate on; it cannot be learnt" in lines
    assert label_order({"10", "9", "-1"}) == ("-1", "9", "10")
    assert label_order({"10", "9", "x"}) == ("10", "9", "x")


def test_one_label_teaches_nothing(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", labelled(("a", "x"), ("b", "x")))
    with pytest.raises(DataError, match=r"every row has the label 'x'; .*two labels at least.*data\.columns"):
        run(path)


def test_what_is_dropped_is_counted(run: Run, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        pairs(("a", "b"), ("same", "same"), ("a", " \n"), ("", "b"), ("a" * 300, "b"), ("a", "b" * 300), ("a", "b")),
    )
    found = run(path, max_length=20, deduplicate=True)
    assert texts(found.train) == [["a", "b"]]
    dropped = {"identical sides": 1, "an empty answer": 2, "overlong": 2, "duplicate": 1}
    assert (found.info[0]["rows"], found.info[0]["kept"], found.info[0]["dropped"]) == (7, 1, dropped)
    rows = [
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "q", "responses": ["a", "a"], "ranks": [1, 2]},
        {"prompt": "q", "responses": ["a", "b", ""], "ranks": [1, 2, 3]},
        {"prompt": "q", "responses": ["a", "b", "b"], "ranks": [1, 2, 3]},  # a and b are told apart
        {"prompt": "q", "responses": ["a", "b", "a"], "ranks": [1, 1, 2]},  # so are b and the later a
    ]
    found = run(write(tmp_path / "b.jsonl", rows))
    assert found.train.counts.tolist() == [3, 3]
    reasons = {"no two answers differ in rank": 1, "identical sides": 1, "an empty answer": 1}
    assert found.info[0]["dropped"] == reasons
    found = run(write(tmp_path / "c.jsonl", labelled(("a", 0), (" ", 0), ("b", 1), ("a" * 300, 1))), max_length=20)
    assert found.info[0]["dropped"] == {"empty": 1, "overlong": 1}


def test_truncated_sides_lose_their_end(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(("98765432", "x"), ("0123456", "012345678"), ("012345678", "01234567")))
    found = run(path, overlong="truncate", max_length=8)
    ids = [TOKENIZER.decode(found.train.ids(s)) for s in range(4)]
    # a digit is a token: eight and EOS are nine, so the EOS goes; the sides of the last row have their first eight in
    # common, those of the second do not, since seven and EOS fit
    assert ids == ["98765432", "x" + EOS, "0123456" + EOS, "01234567"]
    assert found.info[0]["overlong"] == {"truncate": 2}
    assert found.info[0]["dropped"] == {"identical sides": 1}
    assert found.train.longest.tolist() == [8, 8]
    # a prompt alone over the limit leaves nothing to tell answers apart by
    rows = [{"prompt": "q" * 300, "chosen": "a", "rejected": "b"}, *({**r, "prompt": ""} for r in pairs(("a", "b")))]
    found = run(write(tmp_path / "b.jsonl", rows), overlong="truncate", max_length=8)
    assert found.info[0]["dropped"] == {"identical sides": 1}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, {"chosen": "a"}, "field 'rejected' is missing: its columns are chosen"),
        ({"chosen": "a", "rejected": "b"}, {"chosen": None, "rejected": "b"}, "field 'chosen' is null"),
        ({"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": 5}, "field 'rejected' is"),
        ({"chosen": HH + "a", "rejected": HH + "b"}, {"chosen": HH + "a"}, "field 'rejected' is missing"),
        ({"chosen": HH + "a", "rejected": HH + "b"}, {"chosen": HH, "rejected": "b"}, "'rejected' is no HH dialogue"),
        (
            {"chosen": "a", "rejected": "b", "margin": 1},
            {"chosen": "a", "rejected": "b", "margin": float("nan")},
            "field 'margin' is no finite number: got nan",
        ),
        (
            {"chosen": "a", "rejected": "b", "prompt": "q"},
            {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            "fields 'chosen' and 'rejected' share no prompt",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
            {"prompt": "q", "responses": ["a"], "ranks": [1]},
            "field 'responses' is no list of two or more answers",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
            {"prompt": "q", "responses": ["a", "b"], "ranks": [1, float("nan")]},
            "field 'ranks' is no list of numbers",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]},
            {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2]},
            "answers and ranks differ in number: 3 and 2",
        ),
        ({"text": "a", "label": "x"}, {"text": "a", "label": None}, "field 'label' is null"),
        ({"text": "a", "label": "x"}, {"text": "a", "label": " "}, "an empty label"),
        ({"text": "a", "label": "x"}, {"text": "a", "label": 0.5}, "field 'label' is neither text nor a whole number"),
    ],
)
def test_bad_rows_stop_the_run_or_are_counted(
    run: Run, tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    rows = [good, bad, good | {"label": "y"} if "label" in good else good]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        run(path)
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "data.on_bad_row=skip" in str(caught.value)
    assert "\n" not in str(caught.value)
    found = run(path, on_bad_row="skip")
    assert len(found.train) == 2
    assert sum(found.info[0]["dropped"].values()) == 1
    assert next(iter(found.info[0]["dropped"])) in str(caught.value)


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "response": "b"}, {"text": HH + "a"}, {"prompt": "a"}])
def test_data_without_comparisons_is_explained(run: Run, tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        run(write(tmp_path / "a.jsonl", [row]))
    message = str(caught.value)
    assert "a.jsonl:1: has neither two answers to compare nor a label" in message
    assert "paired: chosen or positive + rejected or negative" in message
    assert "labelled: text or sample + label or sentiment" in message
    assert "text2text" not in message
    assert "data.columns" in message


def test_kinds_do_not_mix(run: Run, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", pairs(("a", "b")))
    ranking = write(tmp_path / "b.jsonl", [{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: is a ranking, but .*a\.jsonl:1 is a pair; .*one kind"):
        run([first, ranking])
    with pytest.raises(DataError, match=r"a\.jsonl:1: is a pair, but .*b\.jsonl:1 is a ranking"):
        run(ranking, eval_path=str(first))
    label = write(tmp_path / "c.jsonl", labelled(("a", 0), ("b", 1)))
    with pytest.raises(DataError, match=r"c\.jsonl:1: is a labelled text, but .*a\.jsonl:1 is a pair"):
        run([first, label])
    with pytest.raises(DataError, match=r"d\.jsonl:1: is a pair, but .*c\.jsonl:1 is a labelled text"):
        run(label, eval_path=str(write(tmp_path / "d.jsonl", pairs(("a", "b")))))


def test_the_split_of_pairs_is_the_last_rows(run: Run, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", pairs(("a", "0"), ("b", "0"), ("c", "c")))
    second = write(tmp_path / "b.jsonl", pairs(("d", "0"), ("e" * 50, "0"), ("f", "0")))
    # 5 rows are left when the identical one is gone; 40 % are 2, one of which is too long
    found = run([first, second], validation_split_percentage=40, max_length=10)
    assert texts(found.train) == [["a", "0"], ["b", "0"], ["d", "0"]]
    assert texts(found.eval) == [["f", "0"]]
    assert found.eval is not None
    assert found.eval.groups.tolist() == [0, 2]
    assert (found.eval.row_numbers.tolist(), found.eval.sources.tolist()) == ([4], [1])
    assert found.eval.lengths.tolist() == [len(found.eval.ids(s)) for s in range(2)]
    assert found.eval.ranks.tolist() == [0, 1]
    assert found.eval.sequence_digests.tolist() == [row_digest(TextRow(t)) for t in "f0"]
    first_two = found.train.first(2)
    assert texts(first_two) == [["a", "0"], ["b", "0"]]
    data = ComparisonDataConfig(path=[str(first), str(second)], validation_split_percentage=40)
    assert list(comparison_texts(data, TEMPLATES["none"])) == ["a", "0", "b", "0", "d", "0"]


def test_eval_path_weights_and_limit(run: Run, tmp_path: Path) -> None:
    train = [
        write(tmp_path / "a.jsonl", pairs(*((f"a {i}", "0") for i in range(200)))),
        write(tmp_path / "b.jsonl", pairs(*((f"b {i}", "0") for i in range(200)))),
    ]
    evaluation = write(tmp_path / "c.jsonl", pairs(("c", "0")))
    found = run(train, eval_path=str(evaluation), weights=[0.5, 2])
    assert texts(found.eval) == [["c", "0"]]
    assert [info["path"] for info in found.info] == [*map(str, train), str(evaluation)]
    assert 65 < found.train.repeats[:200].sum() < 135  # n = 200, p = ½: 100 ± 7.1, five of them
    assert set(found.train.repeats[200:]) == {2}
    assert found.eval is not None
    assert found.eval.repeats.tolist() == [1]
    assert len(run(train, limit=250).train) == 250


def test_nothing_left_lists_the_reasons(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(("a" * 50, "b"), ("a", "a")))
    with pytest.raises(DataError) as caught:
        run(path, max_length=8)
    message = str(caught.value)
    assert "nothing is left to train on; of 2 rows identical sides: 1, overlong: 1" in message
    assert "data.max_length=8, data.overlong=drop, data.weights" in message
    with pytest.raises(DataError, match=r"nothing is left to evaluate on; of 2 rows overlong: 1"):
        run(
            write(tmp_path / "b.jsonl", pairs(("a", "b"), ("b" * 50, "a"))), validation_split_percentage=1, max_length=8
        )
    bad = write(tmp_path / "c.jsonl", [{"chosen": "a", "rejected": None}])
    with pytest.raises(DataError, match=r"nothing is left to train on; of 1 rows field 'rejected' is null: 1"):
        run(bad, on_bad_row="skip")
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(DataError, match=r"d\.jsonl: no rows in it"):
        run(tmp_path / "d.jsonl")


# --- the split of labelled rows


def test_labelled_rows_are_drawn_class_by_class(run: Run, tmp_path: Path) -> None:
    rows = labelled(*((f"h {i}", "happy") for i in range(60)), *((f"s {i}", "sad") for i in range(25)))  # sorted
    path = write(tmp_path / "a.jsonl", rows)
    found = run(path, validation_split_percentage=10)
    assert found.eval is not None
    assert Counter(found.eval.labels.tolist()) == {0: 6, 1: 3}  # 10 % of 60; of 25, rounded up
    assert Counter(found.train.labels.tolist()) == {0: 54, 1: 22}
    train, evaluation = [t for (t,) in texts(found.train)], [t for (t,) in texts(found.eval)]
    everything = [row["text"] for row in rows]
    assert [t for t in everything if t in train] == train  # in file order
    assert [t for t in everything if t in evaluation] == evaluation
    assert sorted(train + evaluation) == sorted(everything)
    assert [everything[i] for i in found.eval.row_numbers] == evaluation
    again = run(path, validation_split_percentage=10, tokenizer=sentencepiece_like(), tokenizer_digest="s")
    assert again.eval is not None
    assert again.eval.row_numbers.tolist() == found.eval.row_numbers.tolist()  # whatever the tokenizer
    other = run(path, validation_split_percentage=10, split_seed=1)
    assert other.eval is not None
    assert other.eval.row_numbers.tolist() != found.eval.row_numbers.tolist()
    data = ComparisonDataConfig(path=str(path), validation_split_percentage=10)
    assert list(comparison_texts(data, TEMPLATES["none"])) == train
    assert found.info[0]["kept"] == 85


def test_the_draw_is_numpys_permutation() -> None:
    labels = np.array([0, 1] * 10)
    held = stratified_draw(labels, np.arange(20, dtype=np.uint64), 30, seed=5)
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        first_three = np.random.default_rng([5, label]).permutation(rows)[:3]
        assert sorted(first_three.tolist()) == np.flatnonzero(held & (labels == label)).tolist()


def test_repeated_texts_and_lone_rows() -> None:
    draw = lambda labels, texts, percentage: stratified_draw(
        np.array(labels), np.array(texts, np.uint64), percentage, 0
    ).tolist()
    assert draw([0, 1, 1, 1], [7, 1, 2, 3], 1)[0] is False  # the only row of a label is for training
    assert sum(draw([0] * 7, range(7), 99)) == 6
    assert draw([0] * 9, [4] * 9, 10) == [False] * 9  # one text nine times: not all of it, so nothing of it
    # ten texts twice each, 10 % of 20 are 2: one text with both its rows
    assert sum(draw([0] * 20, [*range(10), *range(10)], 10)) == 2
    # a goal of 1 is missed by 1 with a text of two rows, and by 1 without it
    assert sum(draw([0] * 4, [5, 5, 6, 6], 10)) == 2


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=60),
    st.sampled_from([0.5, 10.0, 33.0, 90.0]),
    st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_no_text_stands_on_both_sides(rows: list[tuple[int, int]], percentage: float, seed: int) -> None:
    labels = np.array([label for label, _ in rows], np.int64)
    digests = np.array([text for _, text in rows], np.uint64)
    held = stratified_draw(labels, digests, percentage, seed)
    assert not set(digests[held]) & set(digests[~held])
    alone = all(n == 1 for n in Counter(digests.tolist()).values())
    for label in set(labels.tolist()):
        mine = labels == label
        if alone:
            assert held[mine].sum() == min(eval_count(int(mine.sum()), percentage), int(mine.sum()) - 1)


# --- detection


def test_sample_is_a_text_only_beside_a_label(run: Run, tmp_path: Path) -> None:
    data = DataConfig(path=str(write(tmp_path / "a.jsonl", [{"sample": "x"}])), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="cannot tell the format from the columns sample"):
        prepare(data, TOKENIZER, "t", TEMPLATES["none"], lambda line: None)
    labelled_rows = [{"sample": "x", "sentiment": "sad"}]
    data = DataConfig(path=str(write(tmp_path / "b.jsonl", labelled_rows)), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="a labelled row has a text and a label"):
        prepare(data, TOKENIZER, "t", TEMPLATES["none"], lambda line: None)
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "sample": 3, "label": 1}
    assert run(write(tmp_path / "c.jsonl", [row])).kind == "pairs"


# --- the cache


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
    path = write(tmp_path / "a.jsonl", labelled(("one", 0), ("two", 1), ("three", 0), ("four", 1)))
    built = count_builds(monkeypatch)
    first = run(path)
    lines: list[str] = []
    again = run(path, weights=[2.0], report=lines.append)
    assert len(built) == 1
    assert "from the cache" in lines[0]
    assert (again.kind, again.labels, again.info, again.digest) == (first.kind, first.labels, first.info, first.digest)
    assert texts(again.train) == texts(first.train)
    assert again.train.repeats.tolist() == [2] * 4
    changes: list[dict[str, Any]] = [
        {"max_length": 100},
        {"overlong": "truncate"},
        {"limit": 3},
        {"deduplicate": True},
        {"validation_split_percentage": 25.0},
        {"split_seed": 1},
        {"tokenizer_digest": "u"},
        {"template": TEMPLATES["hh"]},
        {"columns": {"text": "text"}},
        {"on_bad_row": "skip"},
        {"format": "labelled"},
    ]
    for number, change in enumerate(changes, start=2):
        run(path, **change)
        assert len(built) == number, change
    write(path, labelled(("one", 0), ("two", 1), ("three", 0), ("five", 1)))
    assert texts(run(path).train)[-1] == ["five"]
    assert len(set(built)) == len(changes) + 2


def test_sft_and_rm_do_not_share_entries(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(("a", "b")))
    data = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"))
    assert prepare(data, TOKENIZER, "t", TEMPLATES["none"], lambda line: None).digest != run(path).digest


def test_chunks_do_not_change_the_rows(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for i in range(40):
        ranks = list(range(2 + i % 4))
        rows.append({"prompt": f"q {i}", "responses": [f"a {i} {k}" * (k + 1) for k in ranks], "ranks": ranks})
    path = write(tmp_path / "a.jsonl", rows)
    whole = run(path, max_length=24, validation_split_percentage=10)
    monkeypatch.setattr(comparisons, "CHUNK_GROUPS", 3)
    monkeypatch.setattr(comparisons, "CACHE_VERSION", -1)
    chunked = run(path, max_length=24, validation_split_percentage=10)
    assert chunked.digest != whole.digest
    assert 0 < whole.info[0]["dropped"]["overlong"] < 30
    for one, other in ((whole.train, chunked.train), (whole.eval, chunked.eval)):
        assert one is not None
        assert other is not None
        for name in ComparisonRows.__dataclass_fields__:
            assert list(getattr(one, name)) == list(getattr(other, name)), name


def test_a_chat_template_that_refuses_is_a_bad_row(run: Run, tmp_path: Path) -> None:
    jinja = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    rows = [{**row, "prompt": "q"} for row in pairs(("a", "b"), ("a", "b"))]
    path = write(tmp_path / "a.jsonl", [rows[0], {**rows[1], "system": "s"}])
    template = Template("tokenizer", jinja)
    with pytest.raises(DataError, match=r"a\.jsonl:2: refused by the chat template"):
        run(path, template)
    assert run(path, template, on_bad_row="skip").info[0]["dropped"] == {"refused by the chat template": 1}


def test_half_a_character_names_the_row_or_is_counted(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(("good", "bad"), ("a cut \ud83d", "bad")))
    with pytest.raises(DataError, match=r"a\.jsonl:2: half a character: 'a cut \\ud83d' is no valid Unicode"):
        run(path)
    assert run(path, on_bad_row="skip").info[0]["dropped"] == {"half a character": 1}
    path = write(tmp_path / "b.jsonl", labelled(("x", "sad"), ("y", "happy"), ("z", "s\udc00")))
    assert run(path, on_bad_row="skip").info[0]["dropped"] == {"half a character in the label": 1}
    path = write(tmp_path / "c.jsonl", [{"text": "fine"}, {"text": "cut \ud83d"}])
    data = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), on_bad_row="skip")
    found = prepare(data, TOKENIZER, "t", TEMPLATES["none"], lambda line: None)
    assert found.info[0]["dropped"] == {"half a character": 1}


def test_hundreds_of_labels_are_not_hundreds_of_lines(run: Run, tmp_path: Path) -> None:
    rows = labelled(*((f"t{i}", i % 30) for i in range(90)))
    evaluation = write(tmp_path / "e.jsonl", labelled(("t", 29), ("t", 77)))
    lines: list[str] = []
    run(write(tmp_path / "a.jsonl", rows), eval_path=str(evaluation), report=lines.append)
    assert [line for line in lines if line.startswith(("data: label", "data: and"))] == [
        *(f"data: label {i}: 3 rows to train on, 0 to evaluate on" for i in range(20)),
        "data: label 77: 0 rows to train on, 1 to evaluate on; it cannot be learnt",
        "data: and 10 further labels",
    ]
