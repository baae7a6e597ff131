"""Which run was made from which: nodes in columns, a step of the chain each, and the edges between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_cli.report.runs import Run, parents_of

SWEEPS = 4  # over the columns, to bring what belongs together to the same height; few chains need more than two


@dataclass(frozen=True)
class Node:
    """key: path of a run, or name of a model that no run made; listed: one of the report's runs."""

    key: str
    name: str
    stage: str
    status: str
    listed: bool


class Edge(NamedTuple):
    """source, target: keys of nodes; role: what the target uses the source as."""

    source: str
    target: str
    role: str


@dataclass
class Chain:
    """columns: what stands in each, from top to bottom: a node's key, or an Edge that passes through."""

    nodes: dict[str, Node]
    edges: list[Edge]
    columns: list[list[str | Edge]] = field(default_factory=list)


def make_chain(runs: Sequence[Run], ancestors: dict[str, dict[str, Any]]) -> Chain:
    """The runs, those that they were made from, and the models at the very beginning. ancestors: manifests by path."""
    nodes = {str(run.path): Node(str(run.path), run.name, run.stage, run.status, True) for run in runs}
    manifests = {str(run.path): run.manifest for run in runs} | ancestors
    edges: list[Edge] = []
    for key, manifest in manifests.items():
        if key not in nodes:
            nodes[key] = ancestor_node(key, manifest)
    for key, manifest in manifests.items():
        found = [(parent.role, same_run(parent.path, runs)) for parent in parents_of(manifest)]
        base = manifest.get("base_model")
        if isinstance(base, str) and not any(is_same_place(base, path) for _, path in found):
            run_dir = str(Path(base).parent)  # of a model that is named inside the run that made it
            base = run_dir if run_dir in manifests else base
            found.append(("base", base))
            nodes.setdefault(base, Node(base, last_parts(base), "model", "", False))
        for role, path in found:
            nodes.setdefault(path, ancestor_node(path, {}))
            edges.append(Edge(path, key, role))
    # An ancestor that turned out to be a listed run under another path has no edge of its own.
    touched = {key for edge in edges for key in (edge.source, edge.target)}
    nodes = {key: node for key, node in nodes.items() if node.listed or key in touched}
    edges = [edge for edge in dict.fromkeys(edges) if edge.source != edge.target]
    chain = Chain(nodes, edges)
    chain.columns = arrange(chain)
    return chain


def ancestor_node(path: str, manifest: dict[str, Any]) -> Node:
    return Node(path, last_parts(path), str(manifest.get("stage", "run")), str(manifest.get("status", "gone")), False)


def last_parts(path: str) -> str:
    return str(Path(*Path(path).parts[-2:]))


def same_run(recorded: str, runs: Sequence[Run]) -> str:
    """The path of the listed run that a manifest means. Runs that were moved together are found by the run_dir they
    were started with, if that fits one of them only."""
    if any(str(run.path) == recorded for run in runs):
        return recorded
    fitting = [run for run in runs if is_same_place(str(run.config.get("run_dir") or ""), recorded)]
    return str(fitting[0].path) if len(fitting) == 1 else recorded


def is_same_place(named: str, absolute: str) -> bool:
    """Whether a path, perhaps relative to a directory that is not known any more, can be the absolute one."""
    parts = [part for part in Path(named).parts if part != "."]
    return bool(parts) and list(Path(absolute).parts[-len(parts) :]) == parts


def arrange(chain: Chain) -> list[list[str | Edge]]:
    """A column for each step of the chain; edges that skip columns get a place in those."""
    depth = depths(chain)
    columns: list[list[str | Edge]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for key in chain.nodes:
        columns[depth[key]].append(key)
    for edge in chain.edges:
        for between in range(depth[edge.source] + 1, depth[edge.target]):
            columns[between].append(edge)
    for sweep in range(SWEEPS):
        order = range(1, len(columns)) if sweep % 2 == 0 else range(len(columns) - 2, -1, -1)
        for i in order:
            near = i - 1 if sweep % 2 == 0 else i + 1
            height = {item: place / len(columns[near]) for place, item in enumerate(columns[near])}
            columns[i] = sorted(columns[i], key=lambda item: barycentre(item, chain, height, columns[i]))
    return columns


def barycentre(item: str | Edge, chain: Chain, height: dict[str | Edge, float], column: list[str | Edge]) -> float:
    """Mean height of the neighbours in the next column; what has none there stays where it is."""
    if isinstance(item, Edge):
        neighbours: list[str | Edge] = [item, item.source, item.target]
    else:
        mine = [edge for edge in chain.edges if item in (edge.source, edge.target)]
        neighbours = [n for edge in mine for n in (edge, edge.source, edge.target) if n != item]
    found = [height[neighbour] for neighbour in neighbours if neighbour in height]
    return sum(found) / len(found) if found else column.index(item) / len(column)


def depths(chain: Chain) -> dict[str, int]:
    """The length of the longest way to each node. Edges that close a circle, which only a damaged manifest can have,
    are dropped from the chain."""
    above: dict[str, list[Edge]] = {key: [] for key in chain.nodes}
    for edge in chain.edges:
        above[edge.target].append(edge)
    found: dict[str, int] = {}
    circular: set[Edge] = set()

    def visit(key: str, path: tuple[str, ...]) -> int:
        if key not in found:
            sources = []
            for edge in above[key]:
                if edge.source in (*path, key):
                    circular.add(edge)
                else:
                    sources.append(visit(edge.source, (*path, key)) + 1)
            found[key] = max(sources, default=0)
        return found[key]

    for key in chain.nodes:
        visit(key, ())
    chain.edges = [edge for edge in chain.edges if edge not in circular]
    return found
