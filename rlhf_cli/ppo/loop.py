"""The PPO loop: iterations with their figures, evaluations, alarms, checkpoints, stops.

An iteration is a function of its number, the weights and the state: prompts by a cursor, noise and orders by hashes of
the seed. So a checkpoint after any iteration is all that a resumed run needs to repeat the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cli.loop import StopAsked
from rlhf_cli.ppo import checkpoints
from rlhf_cli.ppo.alarms import explain, find_alarms
from rlhf_cli.ppo.collect import CollectingFailed, Collector
from rlhf_cli.ppo.evaluate import Evaluation, evaluate
from rlhf_cli.ppo.iteration import Done, iterate
from rlhf_cli.ppo.ptx import PtxTerm
from rlhf_cli.ppo.samples import write_samples
from rlhf_cli.ppo.state import PpoState
from rlhf_cli.run import prune_best, save_best
from rlhf_cli.runtime.distributed import any_rank
from rlhf_cli.runtime.metrics import MetricsLog

Ending = Literal["finished", "halted", "interrupted"]


@dataclass
class Loop:
    """log: None on other ranks than 0. flops: see iterate."""

    collector: Collector
    evaluation: Evaluation
    ptx: PtxTerm | None
    log: MetricsLog | None
    flops: Callable[[int, int], float]

    def run(self, state: PpoState) -> Ending:
        """From state.iteration to the last one, or to an alarm that stops. When interrupted, a checkpoint is there."""
        run, config = self.collector.run, self.collector.config
        total = config.ppo.num_iterations
        if run.display is not None:
            run.display.start(state.iteration, total, "iteration")
        while True:
            try:
                self._settle(state)
                if state.iteration >= total or state.halted:
                    break
                done = iterate(self.collector, state, self.ptx, self.flops)
            except StopAsked:
                self._save(state)
                return "interrupted"
            except CollectingFailed:
                if state.iteration:  # what failed, a server for one, may come back
                    self._save(state)
                raise
            self._after(done, state)
            stop = any_rank(bool(run.process.watch.requested))
            if stop or (config.train.save_every and state.iteration % config.train.save_every == 0):
                self._save(state)
            if stop:
                return "interrupted"
        if config.train.save_every and state.iteration % config.train.save_every:
            self._save(state)
        return "halted" if state.halted else "finished"

    def _settle(self, state: PpoState) -> None:
        """Evaluate if it is time to, and write the last iteration's line. Raises StopAsked; may be called again."""
        if self._due(state) and state.evaluated != state.iteration:
            figures = evaluate(self.evaluation, self.collector, state.iteration)
            self._note_evaluation(figures, state)
            state.line = (state.line or {"step": state.iteration, "episode": state.episodes}) | figures
        if state.line is not None:
            if self.log is not None:
                self.log.write(state.line)
            state.line = None

    def _due(self, state: PpoState) -> bool:
        if not self.evaluation:
            return False
        settings = self.collector.config
        last = state.iteration >= settings.ppo.num_iterations or state.halted
        every = settings.train.eval_every
        return last or state.iteration == 0 or (every > 0 and state.iteration % every == 0)

    def _note_evaluation(self, figures: dict[str, float], state: PpoState) -> None:
        run = self.collector.run
        run.say(
            f"evaluation after iteration {state.iteration}: "
            + "  ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in figures.items())
        )
        state.evaluated, state.last_eval = state.iteration, figures
        state.first_eval = state.first_eval or figures
        better = figures.get("eval_reward", float("-inf")) > state.best_eval.get("eval_reward", float("-inf"))
        if self.keeps_best and better and not state.halted:
            state.best_eval, state.best_step = figures, state.iteration
            save_best(run, self.collector.models.policy, state.iteration, only_trainable=True)
            if run.ranks.is_main:
                prune_best(run.run_dir, newest=state.iteration)

    @property
    def keeps_best(self) -> bool:
        """Whether the best policy so far is kept for an alarm that ends the run."""
        return self.collector.config.ppo.alarms.action == "stop"

    def _after(self, done: Done, state: PpoState) -> None:
        """Show an iteration, and look for alarms."""
        run, config = self.collector.run, self.collector.config
        line: dict[str, Any] = done.line
        state.line = line
        if done.warning is not None:
            line["alarm/negative_kl"] = 1.0
            if "negative_kl" not in state.raised:
                state.raised.append("negative_kl")
                run.say(f"alarm negative_kl: {done.warning}")
        alarms = find_alarms(state.watched, config.ppo.alarms)
        for name, what in alarms.items():
            line[f"alarm/{name}"] = 1.0
            if name not in state.raised:
                state.raised.append(name)
                run.say(explain(name, what))
        if alarms and self.keeps_best:
            state.halted = True
        if run.display is not None:
            run.display.step(state.iteration, _shown(line))
        every = config.logging.log_samples_every
        if every and self.log is not None and (state.iteration - 1) % every == 0:
            write_samples(done.answers, done.judged, done.experience, state.iteration - 1, run, self.log)

    def _save(self, state: PpoState) -> None:
        checkpoints.save(self.collector.models, state, self.collector.run)


def _shown(line: dict[str, Any]) -> dict[str, str]:
    """The figures of an iteration beside the bar."""
    seconds = [line[f"perf/{phase}_s"] for phase in ("generate", "score", "train")]
    total = sum(seconds) or 1.0
    return {
        "reward": f"{line['objective/scores']:.3f}",
        "KL": f"{line['objective/kl']:.2f}",
        "length": f"{line['text/length']:.0f}",
        "tokens/s": f"{line['perf/tokens_per_s']:,.0f}",
        "generate/score/train": "/".join(f"{100 * part / total:.0f}" for part in seconds) + " %",
    }
