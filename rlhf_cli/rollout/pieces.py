"""What each token adds to a text, in bytes, so that text can be followed token by token without decoding it again."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=4)
def token_pieces(tokenizer: Any, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes that each of `vocab_size` token ids adds to the text in front of it.

    Put together they are the text as it stands behind a prompt: a SentencePiece token keeps its blank, where decoding
    a response alone would take it off. Special tokens count as the text that they are written as; an id that the
    tokenizer does not know adds nothing.
    """
    known = min(len(tokenizer), vocab_size)
    tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(known)))
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        pieces = [_byte_level(token or "") for token in tokens]
    else:
        pieces = _behind_a_token(tokenizer, known)
        if "ByteFallback" in kinds:
            for i, token in enumerate(tokens):
                if found := BYTE_TOKEN.fullmatch(token or ""):
                    pieces[i] = bytes([int(found[1], 16)])
    return tuple(pieces) + (b"",) * (vocab_size - known)


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The types of the parts of a fast tokenizer's decoder; empty for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    if decoder is None:
        return set()
    return {part["type"] for part in decoder.get("decoders", [decoder])}


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: the characters that byte-level vocabularies are written with.

    Printable bytes stand for themselves, the others for the characters from 256 on (openai/gpt-2, encoder.py).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str) -> bytes:
    table = _byte_of_character()
    # As the decoder does it: a token with any other character was added as plain text.
    return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()


def _behind_a_token(tokenizer: Any, known: int) -> list[bytes]:
    """What decoding shows of each token when another one stands in front."""
    special = set(tokenizer.all_special_ids)
    decode = lambda rows: tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # An ordinary token that stays what it is when something follows: a byte token would melt into its neighbour.
    front = next(
        (i for i, text in enumerate(decode([[i] for i in range(known)])) if i not in special and text.isalnum()), 0
    )
    lead = decode([[front]])[0]
    return [text.removeprefix(lead).encode() for text in decode([[front, i] for i in range(known)])]
