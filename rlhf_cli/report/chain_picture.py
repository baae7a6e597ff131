"""The chain as inline SVG, from left to right, and as words for who cannot see it."""

from __future__ import annotations

from itertools import pairwise

from rlhf_cli.report.chain import Chain, Edge, Node
from rlhf_cli.report.markup import Markup, joined, tag

BOX_WIDTH, BOX_HEIGHT, LANE = 172, 54, 22  # a lane: where an edge passes a column
GAP_ACROSS, GAP_DOWN, MARGIN = 96, 16, 6
NAME_CHARS = 22  # that fit into a box
PORT = 15  # between edges that reach the same box; room for a word above each


def picture(chain: Chain, facts: dict[str, str]) -> Markup:
    """facts: a figure to show in a node's box, by key."""
    places = lay_out(chain)
    height = max(y + size for _, y, size in places.values()) + MARGIN
    width = max(x for x, _, _ in places.values()) + BOX_WIDTH + MARGIN
    parts = [_edge(edge, chain, places) for edge in chain.edges]
    parts += [_box(node, places[node.key], facts.get(node.key, "")) for node in chain.nodes.values()]
    drawn = tag(
        "svg", _arrow_head(), *parts, viewBox=f"0 0 {width} {height}", class_="chain", role="img",
        aria_label="The chain of runs; the list below says the same in words",
        style=f"max-width:{width}px;min-width:{min(width, width * 6 // 10)}px",
    )  # fmt: skip
    return joined([tag("div", drawn, class_="wide", tabindex="0", role="region", aria_label="chain"), _words(chain)])


def lay_out(chain: Chain) -> dict[str | tuple[Edge, int], tuple[int, int, int]]:
    """(left, top, height) of each node, by key, and of each edge that passes a column, by (edge, column). Columns are
    centred."""
    size = lambda item: LANE if isinstance(item, Edge) else _box_height(str(item), chain)
    heights = [sum(size(i) for i in column) + GAP_DOWN * (len(column) - 1) for column in chain.columns]
    places: dict[str | tuple[Edge, int], tuple[int, int, int]] = {}
    for number, column in enumerate(chain.columns):
        x, y = MARGIN + number * (BOX_WIDTH + GAP_ACROSS), MARGIN + (max(heights) - heights[number]) // 2
        for item in column:
            places[(item, number) if isinstance(item, Edge) else item] = (x, y, size(item))
            y += size(item) + GAP_DOWN
    return places


def _box_height(key: str, chain: Chain) -> int:
    """Room for a port of every edge that arrives."""
    arriving = sum(edge.target == key for edge in chain.edges)
    return max(BOX_HEIGHT, PORT * (arriving + 1))


def _edge(edge: Edge, chain: Chain, places: dict[str | tuple[Edge, int], tuple[int, int, int]]) -> Markup:
    x, y, size = places[edge.source]
    points = [(x + BOX_WIDTH, y + size // 2)]
    lanes = sorted(
        (number, place) for key, place in places.items() if isinstance(key, tuple) and key[0] == edge
        for number in [key[1]]
    )  # fmt: skip
    for _, (left, top, lane) in lanes:
        points += [(left, top + lane // 2), (left + BOX_WIDTH, top + lane // 2)]
    left, top, size = places[edge.target]
    # ports in the order in which edges come from above, so that they do not cross before the box
    arriving = sorted((e for e in chain.edges if e.target == edge.target), key=lambda e: _arrival(e, places))
    port = top + size * (arriving.index(edge) + 1) // (len(arriving) + 1)
    points.append((left - 2, port))
    d = f"M{points[0][0]} {points[0][1]}"
    for (x1, y1), (x2, y2) in pairwise(points):
        middle = (x1 + x2) // 2
        d += f"L{x2} {y2}" if y1 == y2 else f"C{middle} {y1} {middle} {y2} {x2} {y2}"
    kind = "reward" if edge.role == "reward" else "other"
    line = tag("path", d=d, class_=f"edge {kind}", marker_end="url(#head)")
    word = tag("text", edge.role, x=left - 10, y=port - 4, text_anchor="end", class_="role")
    return tag("g", line, word)


def _arrival(edge: Edge, places: dict[str | tuple[Edge, int], tuple[int, int, int]]) -> tuple[int, str]:
    """The height from which an edge comes into the last gap."""
    columns = [key[1] for key in places if isinstance(key, tuple) and key[0] == edge]
    _, top, size = places[(edge, max(columns))] if columns else places[edge.source]
    return top + size // 2, edge.role


def _box(node: Node, place: tuple[int, int, int], fact: str) -> Markup:
    x, y, height = place
    kind = f"box {node.status if node.listed else 'unlisted'}"
    middle, across = y + height // 2, x + BOX_WIDTH // 2
    lines = [(_end(node.name), "name"), (_stage_words(node), "stage")]
    if fact:
        lines.append((fact, "fact"))
    first = middle - 7 * (len(lines) - 1)
    words = [
        tag("text", text, x=across, y=first + 14 * i, dy="0.35em", text_anchor="middle", class_=look)
        for i, (text, look) in enumerate(lines)
    ]
    box = tag("rect", x=x, y=y, width=BOX_WIDTH, height=height, rx=6, class_=kind)
    return tag("g", tag("title", node.key), box, *words)


def _stage_words(node: Node) -> str:
    if node.stage == "model":
        return "no run of rlhf"
    return node.stage if node.status == "complete" else f"{node.stage}, {node.status}"


def _end(name: str) -> str:
    return name if len(name) <= NAME_CHARS else "…" + name[1 - NAME_CHARS :]


def _arrow_head() -> Markup:
    tip = tag("path", d="M0 0L7 3.5L0 7z", class_="tip")
    return tag(
        "defs", tag("marker", tip, id="head", refX="6", refY="3.5", markerWidth="7", markerHeight="7", orient="auto")
    )


def _words(chain: Chain) -> Markup:
    entries = []
    for node in chain.nodes.values():
        sources = [f"{edge.role} {chain.nodes[edge.source].name}" for edge in chain.edges if edge.target == node.key]
        if node.listed:
            entries.append(tag("li", f"{node.name} ({_stage_words(node)}) from ", ", ".join(sources) or "no other run"))
    return tag("details", tag("summary", "in words"), tag("ul", *entries))
