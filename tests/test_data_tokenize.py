"""Rows -> tokens with a loss mask, and what becomes of long rows."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data import tokenize
from rlhf_cli.data.rows import DialogueRow, Message, RowError, TextRow, TrainingRow
from rlhf_cli.data.templates import TEMPLATES, Template
from rlhf_cli.data.tokenize import (
    NOTHING_TRAINED,
    OVERLONG,
    Tokens,
    encode_prompt,
    encode_rows,
    fit_length,
    make_encoder,
    row_segments,
)
from rlhf_cli.errors import DataError, ModelError
from tests.data_tokenizers import byte_bpe, sentencepiece_like

TALK = (
    Message("user", "What is a floor?"),
    Message("assistant", "It is so."),
    Message("user", "Say it."),
    Message("assistant", "A room."),
)


def encode(tokenizer: Any, row: TrainingRow, template: Template, loss_on: str = "auto") -> Tokens:
    parts = row_segments(row, template, tokenizer.special_tokens_map, loss_on)
    return encode_rows(make_encoder(tokenizer), [parts])[0]


def runs(tokenizer: Any, tokens: Tokens) -> list[tuple[str, bool]]:
    """The tokens decoded in stretches of equal mask."""
    ids, trained = tokens
    edges = [0, *(np.flatnonzero(np.diff(trained.astype(int))) + 1), len(ids)]
    return [
        (tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False), bool(trained[a])) for a, b in pairwise(edges)
    ]


def test_mask_of_two_turns_by_hand() -> None:
    tokenizer = byte_bpe()
    tokens = encode(tokenizer, DialogueRow(TALK), TEMPLATES["hh"])
    pieces = [
        ("###Human: What is a floor?###Assistant:", False),
        (" It is so.", True),
        ("###Human: Say it.###Assistant:", False),
        (" A room.", True),
        ("<|end|>", True),
    ]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in pieces]
    assert tokens.input_ids.tolist() == list(chain(*ids))
    assert tokens.trained.tolist() == [flag for i, (_, flag) in zip(ids, pieces, strict=True) for _ in i]
    assert tokens.input_ids.dtype == np.int32
    assert tokens.trained.dtype == bool


def test_context_all_and_text() -> None:
    tokenizer = byte_bpe()
    tokens = encode(tokenizer, DialogueRow(TALK, num_context=3), TEMPLATES["hh"])
    assert [trained for _, trained in runs(tokenizer, tokens)] == [False, True]
    assert runs(tokenizer, tokens)[1] == (" A room.<|end|>", True)
    everything = encode(tokenizer, DialogueRow(TALK), TEMPLATES["hh"], "all")
    assert everything.trained.all()
    assert everything.input_ids.tolist() == tokens.input_ids.tolist()  # what is learned does not change the tokens
    text = encode(tokenizer, TextRow("Say it."), TEMPLATES["hh"])
    assert runs(tokenizer, text) == [("Say it.<|end|>", True)]
    with pytest.raises(DataError, match=r"a:1: plain text has no completion .* data\.loss_on=all"):
        encode(tokenizer, TextRow("Say it.", "a:1"), TEMPLATES["hh"], "completion")


def test_chatml_ends_with_marker_and_one_eos() -> None:
    tokenizer = byte_bpe()
    tokens = encode(tokenizer, DialogueRow(TALK), TEMPLATES["chatml"])
    assert runs(tokenizer, tokens)[-1] == ("A room.<|im_end|><|end|>", True)
    assert runs(tokenizer, tokens)[2][0].startswith("\n<|im_start|>user")
    tokenizer.eos_token = "<|im_end|>"  # as Qwen has it
    tokens = encode(tokenizer, DialogueRow(TALK), TEMPLATES["chatml"])
    assert runs(tokenizer, tokens)[-1] == ("A room.<|im_end|>", True)


def test_eos_is_not_doubled_in_text() -> None:
    tokenizer = byte_bpe()
    assert encode(tokenizer, TextRow("so<|end|>"), TEMPLATES["none"]).input_ids.tolist().count(0) == 1


@pytest.mark.parametrize("make", [byte_bpe, sentencepiece_like])
@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_prompt_has_the_same_tokens_in_training_and_at_generation(make: Any, name: str) -> None:
    tokenizer, template = make(), TEMPLATES[name]
    trained = encode(tokenizer, DialogueRow(TALK), template).input_ids
    for end in (1, 3):
        prompt = encode_prompt(make_encoder(tokenizer), template, TALK[:end])
        assert prompt.tolist() == trained[: len(prompt)].tolist()


def test_blank_prefix_tokenizer_gets_bos_once_and_no_blank_inside() -> None:
    tokenizer = sentencepiece_like()
    tokens = encode(tokenizer, DialogueRow(TALK), TEMPLATES["hh"])
    assert tokens.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert tokens.input_ids[0] == tokenizer.bos_token_id
    assert not tokens.trained[0]
    text = "###Human: What is a floor?###Assistant: It is so.###Human: Say it.###Assistant: A room."
    assert tokenizer.decode(tokens.input_ids, skip_special_tokens=True) == text
    # no segment is encoded with a blank of its own in front, as encoding it alone would do
    alone = tokenizer(" It is so.", add_special_tokens=False).input_ids
    trained = tokens.input_ids[np.flatnonzero(tokens.trained)[0] :][: len(alone)].tolist()
    assert tokenizer.convert_ids_to_tokens(alone)[0] in ("▁", "▁▁")
    assert trained != alone


def test_bos_that_the_template_writes_is_not_doubled() -> None:
    tokenizer = sentencepiece_like()
    template = Template("tokenizer", "{{ bos_token }}" + TEMPLATES["hh"].jinja)
    tokens = encode(tokenizer, DialogueRow(TALK), template)
    assert tokens.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        make_encoder(tokenizer)


def test_a_refused_dialogue_is_a_row_error() -> None:
    strict = Template("tokenizer", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RowError, match=r"a:3: refused by the chat template: .*roles must alternate"):
        row_segments(DialogueRow(TALK, "a:3"), strict, {}, "auto")


@pytest.mark.parametrize("make", [byte_bpe, sentencepiece_like])
def test_long_texts_in_pieces_give_the_same_tokens(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    text = "Say it.\n\n  It is so.\nA floor of a room.\n" * 9
    whole = encode(tokenizer, TextRow(text), TEMPLATES["none"])
    monkeypatch.setattr(tokenize, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokenize, "BATCH_CHARS", 80)
    pieces = tokenize._cut(text)
    assert len(pieces) > 5
    assert "".join(pieces) == text
    assert encode(tokenizer, TextRow(text), TEMPLATES["none"]).input_ids.tolist() == whole.input_ids.tolist()
    assert "".join(tokenize._cut("x" * 120)) == "x" * 120  # nowhere to cut well


def tokens_of(trained: list[bool]) -> Tokens:
    return Tokens(np.arange(len(trained), dtype=np.int32), np.array(trained))


def test_fit_length_by_hand() -> None:
    row = tokens_of([False, False, True, True, True])
    (kept,) = fit_length(row, 5, "drop")
    assert (kept.input_ids.tolist(), kept.trained.tolist()) == ([0, 1, 2, 3, 4], [False, False, True, True, True])
    assert fit_length(row, 4, "drop") == OVERLONG
    (cut,) = fit_length(row, 3, "truncate")
    assert (cut.input_ids.tolist(), cut.trained.tolist()) == ([0, 1, 2], [False, False, True])
    assert fit_length(row, 2, "truncate") == NOTHING_TRAINED
    # windows [0 1 2] and [2 3 4]; token 2 is learned in the first and is context in the second
    first, second = fit_length(row, 3, "split")
    assert (first.input_ids.tolist(), first.trained.tolist()) == ([0, 1, 2], [False, False, True])
    assert (second.input_ids.tolist(), second.trained.tolist()) == ([2, 3, 4], [False, True, True])
    # a window without anything to learn is left out
    windows = fit_length(tokens_of([False, False, False, True]), 2, "split")
    assert [w.input_ids.tolist() for w in windows] == [[2, 3]]
    # nothing predicts a first token
    assert fit_length(tokens_of([True]), 4, "drop") == NOTHING_TRAINED


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(2, 20))
def test_windows_predict_every_token_exactly_once(trained: list[bool], max_length: int) -> None:
    windows = fit_length(tokens_of(trained), max_length, "split")
    wanted = [i for i in range(1, len(trained)) if trained[i]]  # the first token is never predicted
    if isinstance(windows, str):
        assert windows == NOTHING_TRAINED
        assert not wanted
        return
    predicted = [int(i) for ids, mask in windows for i, t in zip(ids, mask, strict=True) if t]
    assert predicted == wanted
    assert all(2 <= len(ids) <= max_length for ids, _ in windows)
    assert not any(mask[0] for _, mask in windows)
    assert all((np.diff(ids) == 1).all() for ids, _ in windows)
