"""Trained and loaded tokenizers: exact round trips, special tokens, files that other programs read the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_cli.errors import ModelError
from rlhf_cli.models.tokenizer import (
    add_extra_tokens,
    ensure_pad,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from tests.tiny_models import ARCHS, PLAY, tiny_config, tiny_tokenizer

KINDS = ["bpe", "word", "char"]
BPE = tiny_tokenizer("bpe")


def back_and_forth(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return tokenizer.decode(tokenizer(text).input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_training_text_comes_back_exactly(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    assert back_and_forth(tokenizer, PLAY) == PLAY
    assert tokenizer.unk_token_id not in tokenizer(PLAY).input_ids


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40).filter(lambda s: "<" not in s))
def test_bpe_brings_any_text_back(text: str) -> None:
    assert back_and_forth(BPE, text) == text


def test_word_tokens_are_words_spaces_and_line_breaks() -> None:
    tokenizer = tiny_tokenizer("word")
    assert tokenizer.tokenize("Don't   stop!\n\nAll") == ["Don't", " ", " ", " ", "stop", "!", "\n", "\n", "All"]
    ids = tokenizer("speak zebra.").input_ids
    assert tokenizer.decode(ids) == "speak <unk>."
    assert ids[2] == tokenizer.unk_token_id


def test_unseen_characters_are_unknown() -> None:
    tokenizer = tiny_tokenizer("char")
    assert tokenizer("aßb").input_ids[1] == tokenizer.unk_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_distinct_and_vocabulary_is_bounded(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [PLAY], 270 if kind == "bpe" else 16)
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert len(special) == 3
    assert None not in special
    assert len(tokenizer) == (270 if kind == "bpe" else 16)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_beside_a_model_config_is_the_same(kind: str, arch: str, tmp_path: Path) -> None:
    # transformers picks some tokenizer classes by config.model_type and then ignores parts of tokenizer.json.
    tokenizer = tiny_tokenizer(kind)
    config = tiny_config(arch)
    config.architectures = ["AnythingForCausalLM"]
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = PLAY + "  e\u0301 12345 \u00a0x  , 's\r\n"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(PLAY).input_ids) == PLAY
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(tokenizer)


def test_digest_tells_tokenizers_apart_and_ignores_padding_state() -> None:
    tokenizer = tiny_tokenizer("bpe")
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "long one"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["    "])
    assert tokenizer_digest(tokenizer) != before
    assert len({tokenizer_digest(tiny_tokenizer(k)) for k in KINDS}) == 3


def test_pad_becomes_another_token_than_eos() -> None:
    tokenizer = tiny_tokenizer("bpe")
    size = len(tokenizer)
    assert not ensure_pad(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    assert not ensure_pad(tokenizer)  # <|pad|> is in the vocabulary already
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    stranger = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    stranger.backend_tokenizer.add_special_tokens([])
    assert stranger.pad_token_id == stranger.eos_token_id
    ensure_pad(stranger)
    assert stranger.pad_token_id != stranger.eos_token_id
    assert len(stranger) == size


def test_pad_is_added_to_a_vocabulary_without_it() -> None:
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a")), eos_token="<eos>"
    )
    assert ensure_pad(bare)
    assert (bare.pad_token, bare.pad_token_id, bare.eos_token_id) == ("<|pad|>", 2, 0)
    no_end = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="eos"):
        ensure_pad(no_end)


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_extra_tokens_are_single_and_come_back(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    size = len(tokenizer)
    runs = [" " * 4, " " * 8, "\n\n"]
    if kind == "word":
        tokenizer = train_tokenizer("word", [PLAY, "a b"], 300)
        size = len(tokenizer)
    assert add_extra_tokens(tokenizer, runs) == 3
    assert add_extra_tokens(tokenizer, runs) == 0
    assert len(tokenizer) == size + 3
    text = " " * 8 + "all" + " " * 4 + "me\n\n"
    ids = tokenizer(text).input_ids
    assert [i for i in ids if i >= size] == [tokenizer.convert_tokens_to_ids(r) for r in (runs[1], runs[0], runs[2])]
    assert tokenizer.decode(ids) == text


def test_extra_token_that_does_not_come_back_is_refused() -> None:
    # A byte-level decoder reads the characters of "é" as bytes.
    with pytest.raises(ModelError, match=r"extra_tokens: 'é'"):
        add_extra_tokens(tiny_tokenizer("bpe"), ["é"])


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least 259"):
        train_tokenizer("bpe", [PLAY], 100)
    with pytest.raises(ModelError, match="no text"):
        train_tokenizer("word", [], 100)
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"holds no tokenizer files \(tokenizer.json\); set model.tokenizer.path"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
