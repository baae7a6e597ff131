"""The loop that ppo and raft share: iterations with their figures, evaluations, alarms, checkpoints, stops.

An iteration is a function of its number, the weights and the state: prompts by a cursor, noise and orders by hashes of
the seed. So a checkpoint after any iteration is all that a resumed run needs to repeat the uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cli.align import checkpoints
from rlhf_cli.align.alarms import explain, find_alarms
from rlhf_cli.align.collect import CollectingFailed, Collector
from rlhf_cli.align.evaluate import Evaluation, evaluate
from rlhf_cli.align.state import AlignState
from rlhf_cli.loop import StopAsked
from rlhf_cli.run import prune_best, save_best
from rlhf_cli.runtime.distributed import any_rank
from rlhf_cli.runtime.metrics import MetricsLog

Ending = Literal["finished", "halted", "interrupted"]


@dataclass
class Turn:
    """What an iteration leaves. line: its figures, `step` is its number; shown: those beside the bar; alarms: of its
    own, name -> what is wrong; show_samples: called when it is time to, on rank 0."""

    line: dict[str, Any]
    shown: dict[str, str]
    alarms: dict[str, str]
    show_samples: Callable[[MetricsLog], None]


@dataclass
class Loop:
    """iterate: one iteration; brings the state forward, or raises StopAsked with a state that a checkpoint can go on
    from. log: None on other ranks than 0. keeps_best: the weights of the best evaluation are kept."""

    collector: Collector
    evaluation: Evaluation
    iterate: Callable[[], Turn]
    log: MetricsLog | None
    keeps_best: bool

    def run(self, state: AlignState) -> Ending:
        """From state.iteration to the last one, or to an alarm that stops. When interrupted, a checkpoint is there."""
        run, config = self.collector.run, self.collector.config
        total = config.algorithm.num_iterations
        if run.display is not None:
            run.display.start(state.iteration, total, "iteration")
        while True:
            try:
                self._settle(state)
                if state.iteration >= total or state.halted:
                    break
                turn = self.iterate()
            except StopAsked:
                self._save(state)
                return "interrupted"
            except CollectingFailed:
                if state.iteration:  # what failed, a server for one, may come back
                    self._save(state)
                raise
            self._after(turn, state)
            stop = any_rank(bool(run.process.watch.requested))
            if stop or (config.train.save_every and state.iteration % config.train.save_every == 0):
                self._save(state)
            if stop:
                return "interrupted"
        if config.train.save_every and state.iteration % config.train.save_every:
            self._save(state)
        return "halted" if state.halted else "finished"

    def _settle(self, state: AlignState) -> None:
        """Evaluate if it is time to, and write the last iteration's line. Raises StopAsked; may be called again."""
        if self._due(state) and state.evaluated != state.iteration:
            began = time.monotonic()
            figures = evaluate(self.evaluation, self.collector, state.iteration)
            self._note_evaluation(figures, state)
            state.seconds += time.monotonic() - began
            counters = state.counters(len(self.collector.prompts))
            state.line = (state.line or {"step": state.iteration, "episode": state.episodes}) | counters | figures
        if state.line is not None:
            if self.log is not None:
                self.log.write(state.line)
            state.line = None

    def _due(self, state: AlignState) -> bool:
        if not self.evaluation:
            return False
        settings = self.collector.config
        last = state.iteration >= settings.algorithm.num_iterations or state.halted
        every = settings.train.eval_every
        return last or state.iteration == 0 or (every > 0 and state.iteration % every == 0)

    def _note_evaluation(self, figures: dict[str, float], state: AlignState) -> None:
        run = self.collector.run
        shown = {name.removeprefix("eval_"): value for name, value in figures.items() if name.startswith("eval_")}
        said = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        run.say(f"evaluation after iteration {state.iteration}: {said}")
        state.evaluated, state.last_eval = state.iteration, figures
        state.first_eval = state.first_eval or figures
        better = figures.get("eval_reward", float("-inf")) > state.best_eval.get("eval_reward", float("-inf"))
        if self.keeps_best and better and not state.halted:
            state.best_eval, state.best_step = figures, state.iteration
            save_best(run, self.collector.models.policy, state.iteration, only_trainable=True)
            if run.ranks.is_main:
                prune_best(run.run_dir, newest=state.iteration)

    def _after(self, turn: Turn, state: AlignState) -> None:
        """Show an iteration, and look for alarms."""
        run, config = self.collector.run, self.collector.config
        settings = config.algorithm.alarms
        state.line = turn.line
        found = find_alarms(state.watched, settings, config.stage)
        said = turn.alarms | {name: explain(what, config.stage) for name, what in found.items()}
        for name, what in said.items():
            turn.line[f"alarm/{name}"] = 1.0
            if name not in state.raised:
                state.raised.append(name)
                run.say(f"alarm {name}: {what}")
        if found and settings.action == "stop":
            state.halted = True
        if run.display is not None:
            run.display.step(state.iteration, turn.shown)
        every = config.logging.log_samples_every
        if every and self.log is not None and (state.iteration - 1) % every == 0:
            turn.show_samples(self.log)

    def _save(self, state: AlignState) -> None:
        checkpoints.save(self.collector.models, state, self.collector.run)
