"""Where texts end: bytes of tokens, stop strings in the stream, and the text that is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_cli.rollout.pieces import BYTE_TOKEN, token_pieces
from rlhf_cli.rollout.stops import Ending, Stops, make_stops, spell
from tests.data_tokenizers import byte_bpe, sentencepiece_like
from tests.tiny_models import tiny_tokenizer

EOS = 0


def end_of(stops: Stops, token_ids: list[int]) -> tuple[int, Ending]:
    """How many tokens a text has, and how it ends, as the table says."""
    state = 0
    for i, token in enumerate(token_ids):
        state = int(stops.table[state, token])
        if state >= stops.num_open:
            return i + 1, stops.ending(state)
    return len(token_ids), "length"


def read(stops: Stops, token_ids: list[int]) -> tuple[int, Ending, str, int | None]:
    length, ending = end_of(stops, token_ids)
    return length, ending, *spell(stops, np.array(token_ids[:length], np.int32), ending)


# --- bytes of tokens


def with_bytes() -> Any:
    """A SentencePiece-like tokenizer that writes what it does not know in bytes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = ["</s>", "<pad>", "<unk>", "▁", "a", "▁b", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


TOKENIZERS = {
    "byte_bpe": byte_bpe,
    "sentencepiece": sentencepiece_like,
    "bytes": with_bytes,
    "bpe": lambda: tiny_tokenizer("bpe"),
    "word": lambda: tiny_tokenizer("word"),
    "char": lambda: tiny_tokenizer("char"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_put_together_are_what_decoding_shows(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    pieces = token_pieces(tokenizer, len(tokenizer) + 3)
    assert len(pieces) == len(tokenizer) + 3
    assert pieces[-3:] == (b"", b"", b""), "ids that only the model knows"
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    rng = np.random.default_rng(0)
    # A run of byte tokens that is no text is decoded as one replacement character for each byte, valid ones included.
    usable = [
        i
        for i in range(len(tokenizer))
        if kind != "bytes" or pieces[i].isascii() or not BYTE_TOKEN.match(tokenizer.convert_ids_to_tokens(i))
    ]
    front = next(i for i in range(len(tokenizer)) if pieces[i].strip().isalpha())
    for _ in range(200):
        ids = rng.choice(usable, rng.integers(1, 12)).tolist()
        text = b"".join(pieces[i] for i in ids).decode(errors="replace")
        assert decode([front, *ids]) == decode([front]) + text


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "bytes"])
def test_letters_that_are_spread_over_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    pieces = token_pieces(tokenizer, len(tokenizer))
    ids = tokenizer("é→😀", add_special_tokens=False).input_ids
    assert len(ids) > 3
    assert b"".join(pieces[i] for i in ids).decode().strip() == "é→😀"
    stops = make_stops(pieces, ("→",), frozenset({tokenizer.eos_token_id}))
    length, ending, text, num_text_tokens = read(stops, ids)
    assert (ending, text.strip()) == ("stop", "é")
    assert b"".join(pieces[i] for i in ids[:num_text_tokens]).decode().strip() == "é"
    assert b"".join(pieces[i] for i in ids[:length]).decode().strip() == "é→"


def test_a_blank_in_front_of_a_word_belongs_to_the_response() -> None:
    """Decoding such tokens alone takes it off, and prompt and response would grow together."""
    tokenizer = sentencepiece_like()
    ids = tokenizer("a floor", add_special_tokens=False).input_ids
    stops = make_stops(token_pieces(tokenizer, len(tokenizer)), (), frozenset({tokenizer.eos_token_id}))
    assert tokenizer.decode(ids) == "a floor"
    assert read(stops, ids)[2] == " a floor"


# --- stop strings

PIECES = (b"", b"a", b"b", b"#", b"##", b"###H", b"um", b"an", b" a###Human: b", b"man", b"u", b"#H")


def test_a_stop_string_is_spread_over_tokens() -> None:
    stops = make_stops(PIECES, ("###Human",), frozenset({EOS}))
    # a # # #H um an: spread over five tokens, that end with it
    assert read(stops, [1, 3, 3, 11, 6, 7, 1]) == (6, "stop", "a", 1)


def test_text_around_a_stop_string() -> None:
    stops = make_stops(PIECES, ("###Human",), frozenset({EOS}))
    assert read(stops, [1, 5, 6, 7, 2]) == (4, "stop", "a", 1)
    assert read(stops, [1, 2, 8, 1]) == (3, "stop", "ab a", None), "it begins inside a token, text follows inside"
    assert read(stops, [4, 5, 6, 7]) == (4, "stop", "##", 1), "a # too many in front"
    assert read(stops, [5, 6, 7]) == (3, "stop", "", 0)
    assert read(stops, [5, 10, 9, 1]) == (3, "stop", "", 0)
    assert read(stops, [5, 6, 1, 7]) == (4, "length", "###Humaan", 4)
    assert read(stops, [1, 2, EOS, 1]) == (3, "eos", "ab", 2)
    assert read(stops, [5, 6, EOS]) == (3, "eos", "###Hum", 2)
    assert read(stops, [EOS]) == (1, "eos", "", 0)


def test_several_stop_strings() -> None:
    # "b" is complete first, though "ab#" begins earlier
    assert read(make_stops(PIECES, ("ab#", "b"), frozenset({EOS})), [1, 2, 3]) == (2, "stop", "a", 1)
    # both complete with the same byte: the longer is cut off
    assert read(make_stops(PIECES, ("b", "ab"), frozenset({EOS})), [3, 1, 2]) == (3, "stop", "#", 1)
    # in the last token one follows the other: the first counts
    assert read(make_stops(PIECES, ("b", "###"), frozenset({EOS})), [2, 8])[1:] == ("stop", "", 0)
    assert read(make_stops(PIECES, ("###", ": b"), frozenset({EOS})), [1, 8]) == (2, "stop", "a a", None)
    assert read(make_stops(PIECES, (), frozenset({EOS, 9})), [1, 9, 2]) == (2, "eos", "a", 1)


def test_a_token_without_text_in_front_of_a_stop_string_is_text() -> None:
    stops = make_stops((b"", b"a", b"#", b""), ("#",), frozenset({EOS}))
    assert read(stops, [1, 3, 2]) == (3, "stop", "a", 2)
    assert read(stops, [3, 2, 3]) == (2, "stop", "", 1)


alphabet = st.sampled_from([b"a", b"b", b"#"])
words = st.lists(alphabet, min_size=1, max_size=4).map(b"".join)


@given(
    st.lists(st.lists(alphabet, max_size=4).map(b"".join), min_size=1, max_size=6),
    st.lists(words, max_size=3),
    st.lists(st.integers(0, 6), min_size=1, max_size=12),
)
@example([b"ab"], [b"bab"], [1, 1, 1])
@settings(max_examples=300, deadline=None)
def test_table_equals_reading_byte_by_byte(pieces: list[bytes], strings: list[bytes], ids: list[int]) -> None:
    pieces = [b"<end>", *pieces]
    ids = [i % len(pieces) for i in ids]
    stops = make_stops(tuple(pieces), tuple(s.decode() for s in strings), frozenset({EOS}))
    expected: tuple[int, Ending, str] = (len(ids), "length", b"".join(pieces[i] for i in ids).decode())
    text = b""
    for i, token in enumerate(ids):
        if token == EOS:
            expected = i + 1, "eos", text.decode()
            break
        ends = [
            len(text) + k + 1
            for k in range(len(pieces[token]))
            if (text + pieces[token][: k + 1]).endswith(tuple(strings))
        ]
        text += pieces[token]
        if strings and ends:
            found = text[: ends[0]]
            longest = max(len(s) for s in strings if found.endswith(s))
            expected = i + 1, "stop", found[:-longest].decode()
            break
    length, ending, spelled, num_text_tokens = read(stops, ids)
    assert (length, ending, spelled) == expected
    exact = [
        n for n in range(length + 1) if b"".join(pieces[i] for i in ids[:n]).decode() == spelled and EOS not in ids[:n]
    ]
    assert num_text_tokens == (exact[-1] if exact else None)
