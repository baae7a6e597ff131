"""Run directories for the report, made by hand: what the stages leave, with figures that stand in the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

Rows = list[dict[str, Any]]

PPO: Rows = [
    {"step": 0, "episode": 0, "eval_reward": -1.5, "eval_reward_stderr": 0.25, "eval_loss": 3.25},
    {"step": 1, "episode": 32, "seconds": 10.5, "objective/scores": -1.0, "objective/kl": -0.5, "text/distinct_2": 0.75,
     "text/length": 16.0, "perf/generate_s": 4.0, "perf/score_s": 1.0, "perf/train_s": 3.0, "perf/peak_memory_gb": 2.0},
    {"step": 2, "episode": 1064, "seconds": 1021.0, "objective/scores": -0.75, "objective/kl": 4.0,
     "text/distinct_2": 0.5, "text/length": 20.0, "eval_reward": -0.5, "eval_reward_stderr": 0.125, "eval_loss": 3.5,
     "perf/generate_s": 6.0, "perf/score_s": 2.0, "perf/train_s": 5.0, "perf/peak_memory_gb": 2.5},
]  # fmt: skip
RAFT: Rows = [
    {"step": 0, "episode": 0, "raft/reward_eval": -1.5, "raft/reward_eval_stderr": 0.25},
    {"step": 1, "episode": 64, "seconds": 7.0, "raft/reward_policy": -1.25, "raft/reward_selected": 9.0, "raft/kl": 0.0,
     "raft/distinct_2": 0.875, "raft/length": 17.0, "raft/reward_eval": -1.0, "raft/reward_eval_stderr": 0.25},
]  # fmt: skip
SFT: Rows = [{"step": 5, "loss": 4.0, "seconds": 2.0}, {"step": 10, "loss": 3.5, "eval_loss": 3.75, "seconds": 4.0}]
RM: Rows = [{"step": 8, "loss": 0.5, "accuracy": 0.75, "eval_accuracy": 0.875, "eval_accuracy_stderr": 0.0625}]


def make_run(
    place: Path,
    stage: str,
    lines: Rows,
    *,
    status: str = "complete",
    parents: dict[str, Path] | None = None,
    samples: dict[str, Rows] | None = None,
    manifest: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A run directory as far as the report reads it. parents: by role; samples: by file name; manifest: more entries;
    options: section=..., merged into the config."""
    place.mkdir(parents=True)
    config: dict[str, Any] = {"stage": stage, "run_dir": str(place), "model": {"path": "start"}}
    config["data"] = {"path": "prompts.jsonl"}
    if stage in ("ppo", "raft"):
        config |= {"generation": {"temperature": 1.0}, "eval": {"num_prompts": 64, "temperature": None}}
        config["reward"] = {"sources": [{"type": "model", "path": "rm"}], "normalize": False, "clip": None}
    for section, changes in options.items():
        config[section] = config.get(section, {}) | changes
    entries = [{"role": role, "run_dir": str(path), "digest": "0"} for role, path in (parents or {}).items()]
    said = {"stage": stage, "status": status, "parents": entries, "base_model": None, **(manifest or {})}
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "manifest.json").write_text(json.dumps(said))
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, rows in (samples or {}).items():
        (place / "samples").mkdir(exist_ok=True)
        (place / "samples" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def make_chain(place: Path) -> dict[str, Path]:
    """sft -> rm -> rm_merged -> ppo and raft (which still runs), by name."""
    runs = {"sft": make_run(place / "sft", "sft", SFT, model={"path": None})}
    runs["rm"] = make_run(place / "rm", "rm", RM, parents={"policy": runs["sft"]})
    merged = {"adapter": runs["rm"], "base": runs["sft"]}
    runs["rm_merged"] = make_run(place / "rm_merged", "merge-lora", [], parents=merged)
    used = {"policy": runs["sft"], "reward": runs["rm_merged"]}
    ask = lambda step, answer, score: {
        f"eval_{step:08d}.jsonl": [{"prompt": "Why?", "response": answer, "score": score}]
    }
    runs["ppo"] = make_run(
        place / "ppo", "ppo", PPO, parents=used, samples=ask(0, "No.", -1.0) | ask(2, "Because.", 0.5),
        manifest={"started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T11:01:05+00:00"},
    )  # fmt: skip
    runs["raft"] = make_run(
        place / "raft", "raft", RAFT, status="running", parents=used,
        samples=ask(0, "No.", -1.0) | ask(1, "<script>alert('x')</script>", 0.25),
    )  # fmt: skip
    return runs


def parsed(markup: str) -> ElementTree.Element:
    """A page, or a part of one, as a tree: what is written is XML, too."""
    return ElementTree.fromstring(f"<all>{markup.removeprefix('<!DOCTYPE html>')}</all>")


def cells(markup: str) -> list[list[str]]:
    """The rows of all tables, the heads among them."""
    return [["".join(cell.itertext()) for cell in row] for row in parsed(markup).iter("tr")]


def texts(markup: str, name: str) -> list[str]:
    """What stands in the elements of that name."""
    return ["".join(element.itertext()) for element in parsed(markup).iter(name)]
