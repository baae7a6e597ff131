"""`rlhf raft` in the ranks of a test pool, with a note of all that is generated and scored; cut short there, too."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from rlhf_cli.align import collect, loop
from rlhf_cli.config.compose import compose_stage
from rlhf_cli.config.freeze import freeze
from rlhf_cli.errors import RlhfError
from rlhf_cli.raft import iteration, samples, tune
from rlhf_cli.raft.record import Record
from rlhf_cli.rollout import sampler
from rlhf_cli.runtime import checkpoint
from rlhf_cli.runtime.distributed import Ranks, barrier
from rlhf_cli.runtime.metrics import read_metrics
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.stages import raft
from tests.ppo_models import write_policy_run
from tests.stage_cases import write_letter_reward, write_prompts
from tests.stop_cases import Killed, watch_of

Call = Callable[..., Any]
Weights = dict[str, torch.Tensor]


class Given:
    """A tiny random policy, prompts, and a function that likes the letter e."""

    def __init__(self, root: Path):
        self.policy, self.prompts = write_policy_run(root / "policy"), write_prompts(root / "prompts.jsonl")
        self.letters = write_letter_reward(root)

    def words(self, **more: Any) -> list[str]:
        return raft_words(self.policy, self.prompts, self.letters, **more)


# --- in a run directory


def trail(run_dir: Path, iteration: int, name: str = "generated") -> list[dict[str, Any]]:
    path = run_dir / "samples" / f"iteration_{iteration:02d}" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Of whole iterations; there is one more in front where prompts are held out."""
    return [line for line in read_metrics(run_dir) if line["step"]]


def weights(run_dir: Path, model: str = "model") -> Weights:
    name = "adapter_model" if (run_dir / model / "adapter_model.safetensors").is_file() else "model"
    return load_file(run_dir / model / f"{name}.safetensors")


def equal(one: Weights, two: Weights) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def said(run_dir: Path) -> str:
    return run_dir.with_name(f"{run_dir.name}.said").read_text()


# --- on the ranks


def raft_words(policy: Path, prompts: Path, sources: str, **more: Any) -> list[str]:
    """Three iterations of four prompts with four responses each; more: option=value, `__` for the dot."""
    base: dict[str, Any] = {
        "model.path": policy,
        "data.path": prompts,
        "data.validation_split_percentage": 20,
        "eval.num_prompts": 4,
        "generation.max_new_tokens": 10,
        "generation.batch_size": 6,
        "generation.stop": "['!']",
        "reward.sources": f"[{sources}]",
        "optim.lr": 0.003,
        "raft.num_iterations": 3,
        "raft.batch_size": 4,
        "raft.top_fraction": 0.25,
        "raft.epochs": 2,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 1,
        "train.keep_checkpoints": 9,
        "logging.tensorboard": "false",
        "logging.progress": "none",
    }
    base |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in base.items()]


def run_raft(ranks: Ranks, run_dir: str, overrides: list[str], plots: bool = False) -> dict[str, float]:
    """What a rank of `rlhf raft *overrides run_dir=...` does; returns the final figures. Parts of four responses are
    scored at a time, and what is done is noted, see `done_in`. What is said is in <run_dir>.said."""
    where, terminal = Path(run_dir), io.StringIO()
    composed = _composed(tuple(overrides))  # Hydra takes as long as a whole iteration
    if ranks.is_main:
        freeze(where, composed.values | {"run_dir": run_dir})
    barrier()
    torch.set_num_threads(1)
    process = RankProcess(ranks.rank, ranks.local_rank, ranks.world_size, terminal, StopWatch(where, ranks.rank))
    with ExitStack() as patches:
        patches.enter_context(_noted(where.with_name(f"{where.name}.done"), ranks.rank))
        patches.enter_context(mock.patch.object(samples, "PART", 4))
        if not plots:  # as long again
            patches.enter_context(mock.patch.object(raft, "plot_ranking", return_value=None))
        try:
            return raft.rank_and_tune(composed.config, where, process, ranks)
        finally:
            if ranks.is_main:
                with where.with_name(f"{where.name}.said").open("a", encoding="utf-8") as file:
                    file.write(terminal.getvalue())


@lru_cache(maxsize=32)
def _composed(overrides: tuple[str, ...]) -> Any:
    composed = compose_stage("raft", list(overrides))
    assert not composed.problems + composed.unmet, composed.problems + composed.unmet
    return composed


@contextmanager
def _noted(folder: Path, rank: int) -> Iterator[None]:
    """Every response that ended and is on disk, by the number its noise is hashed with, and every part that was
    scored."""
    folder.mkdir(exist_ok=True)
    generate, judge, judge_all, scoring = collect.generate, collect.Collector.judge, samples._judge, []

    def note(kind: str, what: Any) -> None:
        with (folder / f"{kind}_{rank}.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def generated(model: Any, tokenizer: Any, requests: Sequence[Any], *args: Any, ended: Call, **more: Any) -> Any:
        def ends(number: int, response: Any) -> None:
            ended(number, response)
            note("generated", requests[number].sample)

        return generate(model, tokenizer, requests, *args, ended=ends, **more)

    def judged_all(collector: Any, config: Any, record: Record, answers: Any) -> Any:
        scoring.append(record.done.name)
        try:
            return judge_all(collector, config, record, answers)
        finally:
            scoring.pop()

    def judged(self: Any, answers: Sequence[Any]) -> Any:
        found = judge(self, answers)
        if scoring:
            note("scored", [scoring[0], answers[0].group])
        return found

    with (
        mock.patch.object(collect, "generate", generated),
        mock.patch.object(samples, "_judge", judged_all),
        mock.patch.object(collect.Collector, "judge", judged),
    ):
        yield


def done_in(run_dir: Path, kind: str) -> list[Any]:
    """generated: numbers of the responses that all starts of a run have written, without those of evaluations; scored:
    the parts that rank 0 has scored, as [iteration, number of the first prompt]."""
    ranks = "*" if kind == "generated" else "0"
    files = sorted(run_dir.with_name(f"{run_dir.name}.done").glob(f"{kind}_{ranks}.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [what for what in found if kind != "generated" or what < collect.EVALUATION]


def run_raft_refused(ranks: Ranks, run_dir: str, overrides: list[str]) -> str:
    """What a user reads who starts this."""
    try:
        run_raft(ranks, run_dir, overrides)
    except RlhfError as error:
        return str(error)
    raise AssertionError("nothing was wrong")


PLACES: dict[str, tuple[Any, str]] = {
    "write": (Record, "line"),
    "score": (collect.Collector, "judge"),
    "measure": (samples, "_measure"),
    "publish": (Record, "finish"),
    "tune": (tune.SelectedObjective, "step_data"),
    "evaluate": (loop, "evaluate"),
    "save": (checkpoint, "_publish"),
    "end": (raft, "close_run"),
}


def run_raft_cut(
    ranks: Ranks, run_dir: str, overrides: list[str], phase: str, iterations: int, count: int, kill: bool
) -> dict[str, float]:
    """Cut a run short in the `count`-th call (1 is the first) of what `phase` names, once `iterations` iterations have
    begun: by an exception that stands for SIGKILL, or by asking it to stop as SIGTERM does."""
    owner, name = PLACES[phase]
    original, selected, begun, calls = getattr(owner, name), iteration._selected, 0, 0

    def beginning(*args: Any) -> Any:
        nonlocal begun
        begun += 1
        return selected(*args)

    def cutting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += begun >= iterations
        if calls == count:
            if kill:
                raise Killed
            ask()
        return original(*args, **kwargs)

    with ExitStack() as patches:
        ask = patches.enter_context(watch_of(raft))
        patches.enter_context(mock.patch.object(iteration, "_selected", beginning))
        replaced = staticmethod(cutting) if phase == "write" else cutting
        patches.enter_context(mock.patch.object(owner, name, replaced))
        patches.enter_context(mock.patch.object(sampler, "LOOKS_PER_POLL", 1))
        try:
            figures = run_raft(ranks, run_dir, overrides)
        except Killed:
            figures = {}
    assert calls >= count, f"the run never came to {phase}"
    return figures
