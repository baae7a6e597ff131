"""Where a text ends: end tokens, and stop strings found in the stream of tokens without decoding it.

The strings are the words of an Aho-Corasick automaton over bytes; each token moves it by all bytes that the token adds
to the text. So a table (states, V) says what a token does, and a batch of rows moves in one look-up, however a stop
string is spread over tokens and wherever in a token it begins or ends.

States: 0 is the beginning, a state below `num_open` says how much of a stop string the text ends with.
Shapes: S open states, V vocabulary, B rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

Ending = Literal["eos", "stop", "length"]
NO_BYTE = 256  # column for "the token has no more bytes"


@dataclass(frozen=True)
class Stops:
    """table (S + 2, V) int16 or int32: the state after a token; num_open: S, the states from which the text goes on.

    Closed states, which stay: `num_open` = a stop string is complete, `num_open + 1` = an end token.
    """

    table: np.ndarray
    num_open: int
    pieces: tuple[bytes, ...]
    strings: tuple[bytes, ...]

    def ending(self, state: int) -> Ending:
        """How a text in `state` has ended; one in an open state reached its longest length."""
        return "length" if state < self.num_open else "stop" if state == self.num_open else "eos"


class Spelling(NamedTuple):
    """The text of a response; num_text_tokens: so many leading tokens are exactly it, None when none are."""

    text: str
    num_text_tokens: int | None


@lru_cache(maxsize=4)
def make_stops(pieces: tuple[bytes, ...], strings: tuple[str, ...], end_tokens: frozenset[int]) -> Stops:
    """The table for these stop strings; pieces (V): the bytes of each token. An end token ends, whatever its text."""
    words = tuple(dict.fromkeys(s.encode() for s in strings))
    assert b"" not in words, "an empty stop string stands everywhere"
    steps = _automaton(words)
    num_open = len(steps) - 1
    table = np.concatenate([_token_table(steps, pieces), np.full((1, len(pieces)), num_open + 1)])
    # A generation config may name tokens that the model does not have (-1 for none).
    table[:num_open, sorted(t for t in end_tokens if 0 <= t < len(pieces))] = num_open + 1
    return Stops(table.astype(np.int16 if num_open < 2**15 - 2 else np.int32), num_open, pieces, words)


def spell(stops: Stops, token_ids: np.ndarray, ending: Ending) -> Spelling:
    """The text of a response (T,) without its end.

    A stop string that the prompt's last bytes would begin does not count: only the response is searched. Where several
    stop strings are complete at the same byte, the longest is cut off; what follows it in the last token goes, too.
    """
    pieces = [stops.pieces[t] for t in (token_ids[:-1] if ending == "eos" else token_ids).tolist()]
    text = b"".join(pieces)
    if ending != "stop":
        return Spelling(text.decode(errors="replace"), len(pieces))
    found = [(at + len(word), at) for word in stops.strings if (at := text.find(word)) >= 0]
    _, cut = min(found)
    reached = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    exact = np.flatnonzero(reached == cut)
    return Spelling(text[:cut].decode(errors="replace"), int(exact[-1]) if len(exact) else None)


def _automaton(words: tuple[bytes, ...]) -> np.ndarray:
    """Aho-Corasick steps (S + 1, 257): the state after a byte; column 256 stays. The last state, "found", stays too."""
    children: list[dict[int, int]] = [{}]
    final: set[int] = set()
    for word in words:
        node = 0
        for byte in word:
            if byte not in children[node]:
                children.append({})
                children[node][byte] = len(children) - 1
            node = children[node][byte]
        final.add(node)
    steps = np.zeros((len(children) + 1, NO_BYTE + 1), np.int32)
    fallback = [0] * len(children)
    queue = deque([0])
    while queue:  # breadth first: where a node falls back to is known before its children are
        node = queue.popleft()
        steps[node] = steps[fallback[node]] if node else 0
        for byte, child in children[node].items():
            fallback[child] = int(steps[node, byte])
            steps[node, byte] = child
            if fallback[child] in final:
                final.add(child)
            queue.append(child)
    found = len(children)
    steps[np.isin(steps, sorted(final))] = found
    steps[:, NO_BYTE] = np.arange(found + 1)
    steps[found] = found
    return steps


def _token_table(steps: np.ndarray, pieces: tuple[bytes, ...]) -> np.ndarray:
    """(S + 1, V): the state after all bytes of each token, byte by byte for all tokens that are long enough."""
    lengths = np.array([len(piece) for piece in pieces])
    order = np.argsort(-lengths, kind="stable")  # long ones first: those that go on are always a leading part
    states = np.repeat(np.arange(len(steps), dtype=np.int32)[:, None], len(pieces), axis=1)
    for k in range(int(lengths.max(initial=0))):
        going_on = order[: int((lengths > k).sum())]
        byte = np.array([pieces[t][k] for t in going_on])
        states[:, going_on] = steps[states[:, going_on], byte]
    return states
