"""`-m optim.lr=1e-5,3e-5`: one run after the other, a table at the end (Hydra's grammar, Hydra's own splitting)."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlhf_cli import job
from rlhf_cli.config.compose import compose_stage
from rlhf_cli.errors import EXIT_DONE, EXIT_FAILED, ConfigError, Problem, RlhfError
from rlhf_cli.rundir import read_manifest


def split(words: list[str]) -> list[list[str]]:
    """Every combination of the swept values, each as the words of one run. Other words stay as they are."""
    parser = OverridesParser.create()
    swept = [w for w in words if _is_sweep(parser, w)]
    fixed = [w for w in words if w not in swept]
    (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(swept), None)
    return [fixed + list(run) for run in batch]


def _is_sweep(parser: OverridesParser, word: str) -> bool:
    """Whether a word has several values. One that Hydra cannot read, such as row_format={a} {b}, is checked later."""
    try:
        return not word.startswith("conf=") and parser.parse_override(word).is_sweep_override()
    except HydraException:
        return False


def run_sweep(stage: str, words: list[str], echo: job.Echo) -> int:
    """Run every combination. A failed run does not stop the others; the exit code is that of the worst.

    All combinations are checked before the first one starts. The table is also written to sweep.jsonl.
    """
    given = [w for w in words if w.startswith("run_dir=")]
    words = [w for w in words if w not in given]
    runs = split(words)
    swept = [i for i in range(len(runs[0])) if len({r[i] for r in runs}) > 1]
    _check(stage, runs)
    base = Path(given[0].removeprefix("run_dir=")) if given else _default_base(stage)
    rows: list[dict[str, Any]] = []
    worst = EXIT_DONE
    for number, run in enumerate(runs):
        label = " ".join(run[i] for i in swept)
        where = base / (re.sub(r"[^\w.=-]+", "_", "_".join(run[i] for i in swept)) or "run")
        echo(f"sweep {number + 1}/{len(runs)}: {label}")
        try:
            code = job.run(stage, run, echo, run_dir=where).exit_code
        except RlhfError as error:
            echo(f"error: {error}")
            code = error.exit_code
        rows.append({"run": label, "run_dir": str(where), "exit_code": code, "metrics": _metrics(where)})
        worst = max(worst, EXIT_FAILED if code else EXIT_DONE)
        base.mkdir(parents=True, exist_ok=True)
        (base / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        if code > 128:
            return code
    echo(table(rows))
    return worst


def _check(stage: str, runs: list[list[str]]) -> None:
    """Raise ConfigError with what is wrong with any of the combinations, each problem once."""
    problems: list[Problem] = []
    for run in runs:
        try:
            job.checked(compose_stage(stage, run))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)


def _default_base(stage: str) -> Path:
    return Path("runs") / stage / datetime.now(timezone.utc).strftime("sweep-%Y%m%d-%H%M%S")


def _metrics(run_dir: Path) -> dict[str, Any]:
    return {k: v for k, v in (read_manifest(run_dir).get("metrics") or {}).items() if isinstance(v, int | float)}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each run, with the figures that some run has."""
    wanted = ("eval_reward", "objective/kl", "eval_loss", "loss", "eval_accuracy", "eval_perplexity")
    names = [n for n in wanted if any(n in r["metrics"] for r in rows)]
    width = max(len(r["run"]) for r in rows)
    lines = [" ".join([f"{'run':<{width}}", *(f"{n:>16}" for n in names), "  exit"])]
    for row in rows:
        cells = [f"{row['metrics'][n]:>16.4f}" if n in row["metrics"] else f"{'-':>16}" for n in names]
        lines.append(" ".join([f"{row['run']:<{width}}", *cells, f"{row['exit_code']:>6}"]))
    return "\n".join(lines)
