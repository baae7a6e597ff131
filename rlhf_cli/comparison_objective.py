"""The reward model's objective: pairs, rankings or labels over the global batch, and what held-out rows say of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from rlhf_cli.assemble import Text
from rlhf_cli.data import plan
from rlhf_cli.data.collate import ComparisonBatch, collate_comparisons, collate_sharing
from rlhf_cli.data.comparison_rows import ComparisonRows
from rlhf_cli.data.comparisons import PreparedComparisons
from rlhf_cli.errors import RunFailed
from rlhf_cli.files import write_json, write_text
from rlhf_cli.judgement import Judgement, judge
from rlhf_cli.loop import Conclusion, Micro, StepData, heed_stop
from rlhf_cli.models.prompt_sharing import why_not_shared
from rlhf_cli.ops.losses import classification_loss, kwise_reward_loss, pairwise_reward_loss
from rlhf_cli.run import Run
from rlhf_cli.runtime.distributed import gather_objects
from rlhf_cli.runtime.engine import Engine
from rlhf_cli.runtime.plots import plot_judgement
from rlhf_cli.schema import RmConfig

# Without evaluation data the moments of the scores come from so many rows of the training data.
REFERENCE_ROWS = 1000
# Rows of prompt and answers take a mask and attend over all answers; a small saving is not worth that.
LEAST_SAVED = 0.15
MOST_SHARED_TOKENS = 4096


class ComparisonObjective:
    """Bradley-Terry on pairs, its mean over each prompt's pairs on rankings, cross-entropy on labels."""

    def __init__(
        self, config: RmConfig, data: PreparedComparisons, text: Text, run: Run, architecture: PretrainedConfig
    ):
        self.config, self.data, self.text, self.run = config, data, text, run
        self.rows, self.eval_rows = data.train, data.eval
        settings = config.train
        self.course = plan.Course(len(data.train), data.train.repeats, settings.global_batch_size, settings.seed)
        self.total_steps = plan.num_steps(
            self.course.per_epoch, settings.global_batch_size, settings.epochs, settings.max_steps
        )
        self.shares = self._sharing_pays(architecture)
        self.class_weights = class_weights(data) if config.rm.class_weights == "balanced" else None

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return self.course.epoch(step)

    def step_data(self, step: int) -> StepData[Sequence[int]]:
        """The global batch of a step; this rank's part of it as micro-batches of row numbers."""
        rows = self.course.rows(step)
        weight = float(len(rows))
        if self.class_weights is not None:
            weight = float(self.class_weights[torch.from_numpy(self.rows.labels[rows])].sum())
        return StepData(self._spread(self.rows, rows), weight, self.rows.tokens(rows), len(rows))

    def forward(self, engine: Engine, batch: Sequence[int]) -> Micro:
        """Sum of the losses of one micro-batch's rows."""
        scores, made = self._scores(engine, self.rows, batch)
        loss, sums = self.loss(scores, made)
        return Micro(loss, sums)

    def loss(self, scores: torch.Tensor, batch: ComparisonBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(sum of row losses, sums of figures by name) of scores (N, C) for the N sequences of a batch."""
        center = self.config.rm.center_coef
        if self.data.kind == "labels":
            weights = None if self.class_weights is None else self.class_weights.to(scores.device)
            loss, stats = classification_loss(scores, batch.labels.to(scores.device), weights)
            return loss * stats.weight, {"accuracy": stats.accuracy * stats.num}
        flat = scores[:, 0]
        if self.data.kind == "pairs":
            margins = batch.margins.to(scores.device)
            loss, compared = pairwise_reward_loss(flat[0::2], flat[1::2], margins, center)
        else:
            ranks, prompts = batch.ranks.to(scores.device), batch.prompt_ids.to(scores.device)
            loss, compared = kwise_reward_loss(flat, ranks, prompts, center)
        named = {"accuracy": compared.accuracy, "margin": compared.margin, "mean_reward": compared.mean_reward}
        return loss * compared.num, {name: value * compared.num for name, value in named.items()}

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Figures of the held-out rows; writes evaluation/, and the worst rows into samples/."""
        if self.eval_rows is None:
            return {}
        judged = self._judge(engine, self.eval_rows)
        if self.run.ranks.is_main:
            self._write(judged, step)
        return {f"eval_{name}": value for name, value in judged.figures.items()}

    def conclude(self, engine: Engine, step: int) -> Conclusion:
        """Moments of the scores, plots and tables, from the evaluation of the step whose weights are kept."""
        if self.eval_rows is None:
            few = self.rows.first(REFERENCE_ROWS)
            judged = self._judge(engine, few, to_the_end=True)
            self.run.say(
                f"no evaluation data: mean and std of the scores come from the first {len(few)} rows that were"
                " trained on, and no accuracy is known"
            )
            return Conclusion(reward=judged.reward)
        if not self.run.ranks.is_main:
            return Conclusion()
        report = json.loads(evaluation_file(self.run.run_dir, step).read_text(encoding="utf-8"))
        plot = plot_judgement(self.run.run_dir, f"rlhf rm: {self.run.run_dir.name}, step {step}", report)
        return Conclusion({}, report["reward"], (plot,), report["tables"])

    def _spread(self, source: ComparisonRows, rows: np.ndarray) -> list[list[int]]:
        """This rank's micro-batches of these rows."""
        ranks = self.run.ranks
        planned = plan.plan_groups(
            rows, source.counts[rows], source.longest[rows], ranks.world_size, self.config.train.micro_batch_size,
            self.data.sequences_per_row, source.shared_lengths[rows] if self.shares else None,
        )  # fmt: skip
        return planned[ranks.rank]

    def _scores(
        self, engine: Engine, source: ComparisonRows, rows: Sequence[int]
    ) -> tuple[torch.Tensor, ComparisonBatch]:
        """Scores (N, C) of the N sequences of these rows; N = 0 for none, but the model is called all the same."""
        collate = collate_sharing if self.shares else collate_comparisons
        batch = collate(source, rows, self.text.tokenizer.pad_token_id)
        names = ("input_ids", "position_ids", "last", "rows", "segments")
        given = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
        device = self.run.ranks.device
        scores = engine.forward(**{name: tensor.to(device, non_blocking=True) for name, tensor in given.items()})
        return scores[: len(batch.ranks)], batch

    def _sharing_pays(self, architecture: PretrainedConfig) -> bool:
        """Whether rows hold a prompt once for all its answers: it must save work, and leave the scores as they are.

        Told from config and data alone: a run that goes on has to decide as it did before.
        """
        saved = 1 - self.rows.shared_lengths.sum() / max(1, self.rows.lengths.sum())
        sides = [self.rows] if self.eval_rows is None else [self.rows, self.eval_rows]
        fits = all(rows.shared_lengths.max(initial=0) <= MOST_SHARED_TOKENS for rows in sides)
        if self.config.rm.share_prompts == "never" or self.data.kind == "labels" or saved < LEAST_SAVED or not fits:
            return False
        reason = why_not_shared(architecture)
        if reason is None:
            self.run.say(f"prompts are computed once for all their answers: {saved:.0%} of the tokens are saved")
        else:
            self.run.say(f"prompts are computed once for each answer: {reason}")
        return reason is None

    @torch.no_grad()
    def _judge(self, engine: Engine, source: ComparisonRows, to_the_end: bool = False) -> Judgement:
        """Score all rows and say what the scores are worth; the same on every rank. to_the_end: heed no stop."""
        engine.eval()
        mine: list[tuple[int, list[float]]] = []  # (sequence, its scores)
        for window in plan.windows(len(source), self.config.train.micro_batch_size, self.run.ranks.world_size):
            if not to_the_end:
                heed_stop(self.run.process.watch)
            for rows in self._spread(source, window):
                scores, _ = self._scores(engine, source, rows)
                sequences = [s for row in rows for s in source.sequences(row)]
                mine += zip(sequences, scores.double().tolist(), strict=True)
        engine.train()
        scored = dict(pair for part in gather_objects(mine) for pair in part)
        table = np.array([scored[s] for s in range(len(scored))])
        broken = np.flatnonzero(~np.isfinite(table).all(1))
        if len(broken):
            place = source.place(source.owners[broken[0]])
            raise RunFailed(
                f"evaluation: {len(broken)} of {len(table)} scores are no numbers, the first at"
                f" {place['path']}:{place['line']}. Checkpoints"
                " written before are kept. Lower optim.lr, or use model.dtype=bf16 or fp32"
            )
        return judge(self.data.kind, self.data.labels, source, table, self.config.rm, self.class_weights)

    def _write(self, judged: Judgement, step: int) -> None:
        run_dir, decode = self.run.run_dir, self.text.tokenizer.decode
        write_json(evaluation_file(run_dir, step), {"step": step, **judged.report()})
        lines = [json.dumps(line) for line in judged.scores]
        write_text(run_dir / "evaluation" / f"scores_{step:08d}.jsonl", "".join(f"{line}\n" for line in lines))
        if judged.worst:
            worst = [json.dumps(shown(entry, decode), ensure_ascii=False) for entry in judged.worst]
            write_text(run_dir / "samples" / f"worst_{step:08d}.jsonl", "".join(f"{line}\n" for line in worst))


def evaluation_file(run_dir: Path, step: int) -> Path:
    """Where the evaluation after `step` steps is kept."""
    return run_dir / "evaluation" / f"step_{step:08d}.json"


def shown(entry: dict[str, Any], decode: Any) -> dict[str, Any]:
    """An entry of Judgement.worst with texts in place of tokens."""
    return {key: decode(value) if isinstance(value, np.ndarray) else value for key, value in entry.items()}


def class_weights(data: PreparedComparisons) -> torch.Tensor:
    """(C,) N / (C x rows of the class), repeats counted: every class weighs the same, and the mean weight of a row is 1
    where every class has rows."""
    counts = np.bincount(data.train.labels, data.train.repeats, minlength=len(data.labels))
    return torch.from_numpy(counts.sum() / (len(counts) * np.maximum(counts, 1))).float()
