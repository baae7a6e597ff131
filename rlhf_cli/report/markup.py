"""HTML and SVG as text: everything is escaped unless it is markup already."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

NOTHING = "–"
# Elements of SVG are closed in themselves when they are empty; those of HTML that may be empty are written by hand.
CLOSED = {"circle", "line", "path", "polyline", "polygon", "rect"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """A text as HTML. Control characters, which HTML forbids, become their pictures (␀ for the first); halves of
    surrogate pairs, which no file can hold, the replacement character."""
    if isinstance(value, Markup):
        return value
    shown = "".join(_shown(character) for character in str(value))
    return Markup(html.escape(shown))


def _shown(character: str) -> str:
    code = ord(character)
    if (code < 0x20 and character not in "\n\t") or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    # C1 controls, surrogates and code points that are no characters
    if 0x80 <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        return "\N{REPLACEMENT CHARACTER}"
    return character


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element. In the names of attributes a last _ is dropped (class_) and the others are dashes; None: left out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escaped(value)}"')
    inside = joined(content)
    if name in CLOSED and not inside:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{inside}</{name}>")


def joined(parts: Iterable[object], between: str = "") -> Markup:
    """One after the other, each escaped."""
    return Markup(escaped(between).join(escaped(part) for part in parts))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], caption: str, *, words: int = 1) -> Markup:
    """words: so many columns on the left hold words, the others numbers. The first cell of a row is its heading.

    Wide tables scroll in a box of their own, which the keyboard reaches.
    """
    kind = lambda i: None if i < words else "num"
    top = tag("tr", *(tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(head)))
    body = []
    for first, *others in rows:
        cells = (tag("td", cell, class_=kind(i)) for i, cell in enumerate(others, start=1))
        body.append(tag("tr", tag("th", first, scope="row"), *cells))
    inside = tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body))
    return tag("div", inside, class_="wide", tabindex="0", role="region", aria_label=caption)


def number(value: float | None, form: str) -> str:
    """A figure for a table; – where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return format(value, form)


def duration(seconds: float | None) -> str:
    """`3 min 20 s`, to two units."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    left, words = round(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size or words:
            words.append(f"{left // size} {unit}")
            left %= size
    return " ".join(words[:2])


def shortened(text: str, limit: int, *, keep_end: bool = False) -> str:
    """At most `limit` characters, and how many are left out."""
    if len(text) <= limit:
        return text
    note = f"[… {len(text) - limit:,} more characters]"
    return f"{note} {text[-limit:]}" if keep_end else f"{text[:limit]} {note}"
