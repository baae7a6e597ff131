"""Raw rows -> typed rows: detection, parsing, and what supervised training takes from each."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.data.columns import parse_row_format
from rlhf_cli.data.filters import drop_reason
from rlhf_cli.data.formats import detect_format, parse_row, to_training
from rlhf_cli.data.rows import (
    DOCUMENT,
    DialogueRow,
    LabelledRow,
    Message,
    PairRow,
    PromptRow,
    Row,
    RowError,
    TextRow,
    row_digest,
)
from rlhf_cli.errors import DataError
from rlhf_cli.schema import FilterConfig

HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: "
FIRST = "\n\nHuman: q\n\nAssistant: a"
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str) -> Message:
    return Message("assistant", text)


def parse(values: dict[str, Any], kind: str | None = None) -> Any:
    row = Row(values, "a.jsonl:7", kind)
    return parse_row(row, detect_format(row))


@pytest.mark.parametrize(
    ("values", "kind", "format"),
    [
        ({"text": "x"}, None, "text_only"),
        ({"text": "x"}, "text_only", "text_only"),
        ({"text": "x"}, DOCUMENT, "text_only"),
        ({"text": HH + "a2"}, None, "hh"),
        ({"text": "###Human: q###Assistant: a"}, None, "text_only"),
        ({"input": "q", "output": "a"}, "text2text", "text2text"),
        ({"instruction": "q", "input": "", "output": "a"}, None, "text2text"),
        ({"prompt": "q", "completion": "a", "id": 3}, None, "text2text"),
        ({"question": "q", "answer": "a"}, None, "text2text"),
        ({"messages": TURNS}, None, "conversation"),
        ({"messages": TURNS, "prompt": "q"}, None, "conversation"),
        ({"conversation_id": 1, "system": "s", "messages": TURNS}, "conversation", "conversation"),
        ({"conversations": [{"from": "human", "value": "q"}]}, None, "conversation"),
        ({"chosen": "x", "rejected": "y"}, None, "paired"),
        ({"positive": "x", "negative": "y"}, "text_only", "paired"),  # LMFlow's old reward data declares text_only
        ({"prompt": "q", "chosen": "x", "rejected": "y", "margin": 1}, "paired_text_to_text", "paired"),
        ({"chosen": HH + "x", "rejected": HH + "y"}, None, "hh"),
        ({"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2]}, None, "ranked"),
        ({"input": "q", "output": [{"text": "x", "score": 1.0}]}, "text_to_scored_textlist", "ranked"),
        ({"text": "x", "label": 1}, None, "labelled"),
        ({"prompt": "q", "reference": "r"}, None, "prompts"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:"}, None, "hh"),
    ],
)
def test_detection(values: dict[str, Any], kind: str | None, format: str) -> None:
    assert detect_format(Row(values, "a.jsonl:1", kind)) == format


def test_ambiguous_and_unknown_columns_are_explained() -> None:
    with pytest.raises(
        DataError, match=r"text, chosen, rejected fit text_only and paired; choose one with data\.format"
    ):
        detect_format(Row({"text": "x", "chosen": "x", "rejected": "y"}, "a.jsonl:1"))
    with pytest.raises(DataError, match="fit text2text and conversation"):
        detect_format(Row({"prompt": "x", "response": "y", "messages": TURNS}, "a.jsonl:1"))
    with pytest.raises(DataError) as caught:
        detect_format(Row({"passage": "x", "mood": "happy"}, "a.jsonl:1", "float_only"))
    message = str(caught.value)
    assert "a.jsonl:1: cannot tell the format from the columns passage, mood" in message
    assert "float_only" in message
    assert "text2text: prompt or instruction or question or input + response or" in message
    assert "data.columns" in message
    with pytest.raises(DataError, match="cannot tell"):  # answers without ranks or scores
        detect_format(Row({"responses": ["x", "y"], "prompt_id": 1}, "a.jsonl:1"))


def test_text2text() -> None:
    row = parse({"instruction": "Add.", "input": "1 2", "output": "3", "id": 5, "system": "Be brief."})
    assert row.messages == (Message("system", "Be brief."), user("Add.\n\n1 2"), says("3"))
    assert row.num_context == 2
    assert row.columns["id"] == 5
    assert "output" not in row.columns
    assert parse({"prompt": TURNS[:1], "completion": TURNS[1:]}).messages == (user("q"), says("a"))


def test_conversation_roles_and_system() -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert parse({"conversations": turns}).messages == (Message("system", "s"), user("q"), says("a"))
    row = parse({"messages": TURNS, "system": "s", "conversation_id": 3}, "conversation")
    assert row.messages == (Message("system", "s"), user("q"), says("a"))
    assert row.num_context == 0
    assert row.columns == {"conversation_id": 3}


def test_paired() -> None:
    assert parse({"chosen": "x", "rejected": "y"}) == PairRow(None, "x", "y", None, "a.jsonl:7")
    row = parse({"prompt": "q", "positive": "x", "negative": "y", "margin": "0.5"})
    assert (row.prompt, row.chosen, row.rejected, row.margin) == ((user("q"),), (says("x"),), (says("y"),), 0.5)


def test_paired_dialogues_share_their_prompt() -> None:
    worse = [TURNS[0], {"role": "assistant", "content": "b"}]
    for values in (
        {"chosen": TURNS, "rejected": worse},
        {"prompt": "q", "chosen": TURNS, "rejected": worse},
        {"chosen": {"messages": TURNS}, "rejected": {"messages": worse}},
        {"prompt": "q", "chosen": TURNS[1:], "rejected": worse[1:]},
    ):
        row = parse(values)
        assert (row.prompt, row.chosen, row.rejected) == ((user("q"),), (says("a"),), (says("b"),))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt_length"),
    [
        (HH + "x", HH + "y", 3),
        (HH + "x", HH + "x", 3),
        (HH + "x", "\n\nHuman: q1\n\nAssistant: b1\n\nHuman: q2\n\nAssistant: x", 1),
        # the user goes on differently: the last place where both let the assistant speak is the first turn
        (FIRST + "\n\nHuman: x\n\nAssistant: b", FIRST + "\n\nHuman: y\n\nAssistant: c", 1),
        (HH + "x", "\n\nHuman: q1\n\nAssistant: a1", 1),
        # as in the real data: two assistant turns in a row, an empty answer
        ("\n\nHuman: q\n\nAssistant: a\n\nAssistant: b", "\n\nHuman: q\n\nAssistant: a\n\nAssistant: c", 2),
        ("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: y", 1),
    ],
)  # fmt: skip
def test_hh_pairs(chosen: str, rejected: str, prompt_length: int) -> None:
    row = parse({"chosen": chosen, "rejected": rejected})
    assert row.prompt is not None
    assert len(row.prompt) == prompt_length
    assert row.chosen[0].role == row.rejected[0].role == "assistant"
    back = "".join(
        {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}[m.role] + m.content for m in row.prompt + row.chosen
    )
    assert back.strip() == chosen.strip() or chosen.endswith("Assistant:")


def test_hh_prompts_and_texts() -> None:
    assert parse({"prompt": "\n\nHuman: q\n\nAssistant:"}) == PromptRow((user("q"),), "a.jsonl:7")
    assert parse({"text": HH + " a2 \n"}).messages == (user("q1"), says("a1"), user("q2"), says("a2"))
    given = Row({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " x", "rejected": " y"}, "a.jsonl:1")
    row = parse_row(given, "hh")
    assert isinstance(row, PairRow)
    assert (row.prompt, row.chosen, row.rejected) == ((user("q"),), (says("x"),), (says("y"),))


def test_ranked_by_ranks_and_by_scores() -> None:
    row = parse({"prompt": "q", "responses": ["x", "y", "z"], "ranks": [2, 1, 3]})
    assert (row.responses, row.ranks) == (("x", "y", "z"), (2, 1, 3))
    # scores 0.5, 2, 0.5: none above y; y above x and z, which tie
    row = parse({"prompt": "q", "responses": ["x", "y", "z"], "scores": [0.5, 2, 0.5]})
    assert row.ranks == (2, 1, 2)
    row = parse(
        {"input": "q", "output": [{"text": "x", "score": 0}, {"text": "y", "score": 1}]}, "text_to_scored_textlist"
    )
    assert (row.responses, row.ranks) == (("x", "y"), (2, 1))


def test_labelled_and_prompts() -> None:
    assert parse({"text": "x", "label": "happy"}) == LabelledRow("x", "happy", "a.jsonl:7")
    assert parse({"prompt": "q", "reference": "r"}) == PromptRow((user("q"),), "a.jsonl:7", {"reference": "r"})


@pytest.mark.parametrize(
    ("format", "values", "words"),
    [
        ("text_only", {"txt": "x"}, "field 'text' is missing: its columns are txt"),
        ("text_only", {"text": None}, "field 'text' is null"),
        ("text_only", {"text": 5}, "field 'text' is no text: got 5"),
        ("text2text", {"prompt": "q"}, "field 'response' is missing"),
        ("text2text", {"prompt": "q", "output": 4}, "field 'output' is no list of messages: got 4"),
        ("conversation", {"messages": []}, "field 'messages' is no list of messages"),
        ("conversation", {"messages": ["x"]}, "message 1"),
        (
            "conversation",
            {"messages": [{"role": "tool", "content": "x"}]},
            "message 1 is of 'tool'; allowed: user, human",
        ),
        ("conversation", {"messages": [{"role": "user", "content": None}]}, "without text: message 1: None"),
        ("paired", {"chosen": "x"}, "field 'rejected' is missing"),
        ("paired", {"chosen": "x", "rejected": "y", "margin": "much"}, "field 'margin' is no number: got 'much'"),
        ("paired", {"chosen": "x", "rejected": "y", "margin": float("nan")}, "no finite number"),
        ("paired", {"chosen": TURNS[:1], "rejected": TURNS[:1]}, "share no prompt"),
        ("hh", {"chosen": "x", "rejected": HH}, "field 'chosen' is no HH dialogue"),
        ("ranked", {"prompt": "q", "responses": ["x"], "ranks": [1]}, "no list of two or more answers"),
        ("ranked", {"prompt": "q", "responses": ["x", "y"], "ranks": [1]}, "differ in number: 2 and 1"),
        ("ranked", {"prompt": "q", "responses": ["x", "y"], "ranks": [1, "b"]}, "field 'ranks' is no list of numbers"),
        ("ranked", {"prompt": "q", "responses": ["x", 2], "ranks": [1, 2]}, "not all text"),
        ("ranked", {"prompt": "q", "responses": ["x", "y"]}, "field 'scores' is missing"),
        ("labelled", {"text": "x", "label": 0.5}, "neither text nor a whole number"),
    ],
)
def test_bad_rows_name_row_field_and_reason(format: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(Row(values, "a.jsonl:7"), format)
    assert words in str(caught.value)
    assert str(caught.value).startswith("a.jsonl:7: ")
    assert caught.value.reason in str(caught.value)


def test_row_format_makes_text_of_any_row() -> None:
    row = Row({"prompt": "x", "label": 1}, "a.jsonl:7")
    text = parse_row(row, "text_only", parse_row_format("{prompt}{label}"))
    assert text == TextRow("x1", "a.jsonl:7", row.values)


def test_what_training_takes() -> None:
    assert to_training(parse({"text": "x"})) == TextRow("x", "a.jsonl:7")
    assert to_training(parse({"chosen": "x", "rejected": "y"})) == TextRow("x", "a.jsonl:7")
    pair = to_training(parse({"chosen": HH + "x", "rejected": HH + "y"}))
    assert pair == DialogueRow((user("q1"), says("a1"), user("q2"), says("x")), "a.jsonl:7", num_context=3)
    best = to_training(parse({"prompt": "q", "responses": ["x", "y"], "ranks": [2, 1]}))
    assert best == DialogueRow((user("q"), says("y")), "a.jsonl:7", num_context=1)
    opened = to_training(parse({"messages": [*TURNS, TURNS[0]]}))
    assert isinstance(opened, DialogueRow)
    assert opened.messages == (user("q"), says("a"))  # the question left open is cut off


def test_rows_without_a_text_to_train_on_say_what_to_do() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:7: a labelled row .* data\.row_format='\{text\}\{label\}'"):
        to_training(LabelledRow("x", 1, "a.jsonl:7"))
    with pytest.raises(DataError, match=r"a prompt without an answer .* data\.columns"):
        to_training(PromptRow((user("q"),), "a.jsonl:7"))


def test_digest_of_equal_content_from_different_formats() -> None:
    conversation = to_training(parse({"messages": TURNS}))
    assert row_digest(conversation) == row_digest(to_training(parse({"prompt": "q", "response": "a"})))
    assert row_digest(conversation) == row_digest(to_training(parse({"prompt": "q", "chosen": "a", "rejected": "b"})))
    assert row_digest(conversation) != row_digest(DialogueRow((user("qa"), says(""))))
    assert row_digest(TextRow("q")) != row_digest(DialogueRow((Message("text", "q"), says(""))))


LINES = "short\n" + "y" * 44 + "\n....."  # lengths 5, 44, 5: mean 18; 49 letters in 56 characters


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        (" \n", {}, "empty"),
        (LINES, {}, None),
        (LINES, {"max_mean_line_length": 18}, None),
        (LINES, {"max_mean_line_length": 17.9}, "mean line too long"),
        (LINES, {"max_line_length": 44}, None),
        (LINES, {"max_line_length": 43}, "line too long"),
        (LINES, {"min_alphanumeric_share": 49 / 56}, None),
        (LINES, {"min_alphanumeric_share": 0.876}, "too few letters and digits"),
        ("# Automatically generated by x\ncode", {"drop_generated": True}, "generated file"),
        ("1\n2\n3\n4\n5\nautogenerated", {"drop_generated": True}, None),
        ("# Automatically generated by x\ncode", {}, None),
    ],
)
def test_filters(text: str, settings: dict[str, Any], reason: str | None) -> None:
    assert drop_reason(TextRow(text), FilterConfig(**settings)) == reason


def test_filters_see_dialogues() -> None:
    assert drop_reason(DialogueRow((user("q"), says(" "))), FilterConfig()) == "empty reply"
    context = DialogueRow((user("q"), says("a"), user("q"), says("")), num_context=3)
    assert drop_reason(context, FilterConfig()) == "empty reply"
    assert drop_reason(DialogueRow((user("q" * 9), says("a"))), FilterConfig(max_line_length=8)) == "line too long"
