"""`rlhf sft`: supervised fine-tuning of a causal language model, or pre-training from scratch.

run reads top to bottom: ranks, tokenizer and data, model, engine, resume, loop, save.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlhf_cli.assemble import (
    Text,
    build_model,
    check_length,
    load_data,
    load_text,
    make_or_resume,
    model_config,
    redraw_lisa,
)
from rlhf_cli.data import plan
from rlhf_cli.data.collate import collate
from rlhf_cli.data.dataset import Prepared, prepare
from rlhf_cli.data.rows import Message
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.data.tokenize import encode_prompt, make_encoder
from rlhf_cli.estimate import plan_run
from rlhf_cli.files import write_text
from rlhf_cli.loop import Hooks, LoopState, Micro, StepData, Trackers, Work, train
from rlhf_cli.models.load import resolve_dtype
from rlhf_cli.models.lora import plain_model, save_adapter
from rlhf_cli.models.sample import sample_texts
from rlhf_cli.models.save import save_model
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.models.trainable import count_parameters
from rlhf_cli.run import (
    Checkpoints,
    Run,
    best_dir,
    close_run,
    load_best,
    open_run,
    remove_best,
    save_best,
)
from rlhf_cli.runtime.distributed import gather_objects, sum_over_ranks
from rlhf_cli.runtime.engine import (
    Engine,
    gathered_for_generation,
    gathered_state_dict,
)
from rlhf_cli.runtime.flops import flops_per_token, measured_peak_flops
from rlhf_cli.runtime.manifest import model_dir
from rlhf_cli.runtime.metrics import MetricsLog
from rlhf_cli.runtime.plots import plot_losses
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import SftConfig, to_dict

TEXT_PROMPT_TOKENS = 16  # of a plain evaluation text, as the prompt of a sample


def run(config: SftConfig, run_dir: Path, process: RankProcess) -> dict[str, float]:
    """Train as the config says. Returns the final figures, which are also in the manifest."""
    run = open_run(config, run_dir, process)
    text = load_text(config, run_dir, run)
    data = load_data(config, text, run)
    run.update_manifest(template=text.template.name, data=data.info)

    dtype = resolve_dtype(config.model.dtype, run.ranks.device)
    model = build_model(config, text, dtype, run)
    checkpoints = Checkpoints(run, whole_weights=config.model.trainable.mode == "lisa")
    engine, state = make_or_resume(config, model, dtype, checkpoints, run, data.digest)

    objective = SftObjective(config, data, text, run)
    trackers = open_trackers(config, engine.module, dtype, run, state.step)
    hooks = Hooks(
        partial(redraw_lisa, config=config, dtype=dtype, run=run),
        checkpoints.save,
        lambda engine, step: save_best(run, engine, step, only_trainable=config.model.trainable.mode != "lisa"),
    )
    process.watch.loop_started()
    work = Work(objective, objective.total_steps, config.train, config.optim)
    engine, ending = train(engine, work, state, run.ranks, process.watch, trackers, hooks)
    if trackers.log is not None:
        trackers.log.close()
    if ending == "interrupted":
        run.say(f"interrupted after step {state.step}; the same command goes on from there")
        close_run(run, status="interrupted")
        return {}
    return finish(config, engine, text, state, run, ending == "early_stopped")


def dry_run(config: SftConfig, world_size: int) -> None:
    """Open data and model for a job of `world_size` ranks and print what it would do. Weights are not loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        text = load_text(config, Path(scratch), None)
    data = prepare(config.data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, print)
    architecture = model_config(config, text)
    check_length(architecture, config.data.max_length)
    # Several ranks are several GPUs, also when they are planned on a machine without.
    planned = plan_run(config, data, architecture, world_size, for_gpu=torch.cuda.is_available() or world_size > 1)
    Display(sys.stdout, "none", "sft").table(
        f"rlhf sft --dry-run: {world_size} ranks, nothing was started", planned.rows
    )


# --- the objective


class SftObjective:
    """Token cross-entropy over the global batch, evaluation on held-out rows, and samples."""

    def __init__(self, config: SftConfig, data: Prepared, text: Text, run: Run):
        self.config, self.text, self.run = config, text, run
        self.rows, self.eval_rows = data.train, data.eval
        self.num_targets = targets_per_row(data.train)
        self.per_epoch = plan.epoch_rows(len(data.train), data.train.repeats)
        settings = config.train
        self.total_steps = plan.num_steps(
            self.per_epoch, settings.global_batch_size, settings.epochs, settings.max_steps
        )
        self.flatten = config.data.packing and config.model.attn_implementation.startswith("flash")
        self.prompts = self._prompts()
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step / plan.steps_per_epoch(self.per_epoch, self.config.train.global_batch_size)

    def step_data(self, step: int) -> StepData[plan.MicroBatch]:
        """The global batch of a step; this rank's part of it as micro-batches of row numbers."""
        settings = self.config.train
        position = plan.locate(step, self.per_epoch, settings.global_batch_size)
        if self._order[0] != position.epoch:
            order = plan.epoch_order(len(self.rows), self.rows.repeats, settings.seed, position.epoch)
            self._order = position.epoch, order
        rows = self._order[1][position.rows]
        micro_batches = self._spread(self.rows, rows, self.config.data.packing)
        return StepData(
            micro_batches, float(self.num_targets[rows].sum()), int(self.rows.lengths[rows].sum()), len(rows)
        )

    def forward(self, engine: Engine, batch: plan.MicroBatch) -> Micro:
        """Sum of token losses of one micro-batch."""
        return Micro(self._loss(engine, self.rows, batch), {})

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Loss and perplexity per token on the held-out rows; writes samples."""
        figures: dict[str, float] = {}
        if self.eval_rows is not None:
            loss = self._eval_loss(engine, self.eval_rows)
            figures = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        if self.prompts:
            self._write_samples(engine, step)
        return figures

    def _spread(self, source: TokenRows, rows: np.ndarray, packing: bool) -> list[plan.MicroBatch]:
        ranks = self.run.ranks
        pack_length = self.config.data.max_length if packing else None
        step = plan.plan_step(
            rows, source.lengths[rows], ranks.world_size, self.config.train.micro_batch_size, pack_length
        )
        return step.ranks[ranks.rank]

    def _loss(self, engine: Engine, source: TokenRows, micro_batch: plan.MicroBatch) -> torch.Tensor:
        packed, device = self.config.data.packing, self.run.ranks.device
        batch = collate(source, micro_batch, self.text.tokenizer.pad_token_id, packed=packed, flatten=self.flatten)
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device, non_blocking=True)
        return engine.forward(
            input_ids=batch.input_ids.to(device, non_blocking=True),
            position_ids=batch.position_ids.to(device, non_blocking=True),
            attention_mask=mask,
            targets=batch.targets.to(device, non_blocking=True),
        ).loss_sum

    @torch.no_grad()
    def _eval_loss(self, engine: Engine, source: TokenRows) -> float:
        engine.eval()
        total = torch.zeros((), device=self.run.ranks.device, dtype=torch.float64)
        # Enough rows at a time that sorting them by length saves padding.
        window = self.config.train.micro_batch_size * self.run.ranks.world_size * 16
        for start in range(0, len(source), window):
            rows = np.arange(start, min(start + window, len(source)))
            for micro_batch in self._spread(source, rows, self.config.data.packing):
                total += self._loss(engine, source, micro_batch).double()
        engine.train()
        return sum_over_ranks(total).item() / float(targets_per_row(source).sum())

    def _prompts(self) -> list[list[int]]:
        settings, encoder = self.config.generation, make_encoder(self.text.tokenizer)
        if settings.prompts:
            return [encode_prompt(encoder, self.text.template, [Message("user", p)]).tolist() for p in settings.prompts]
        source = self.eval_rows if self.eval_rows is not None else self.rows
        found = []
        for i in range(min(settings.num_prompts, len(source))):
            ids, trained = source.row(i)
            first = int(trained.argmax())
            found.append(ids[: first if first > 1 else max(1, min(TEXT_PROMPT_TOKENS, len(ids) // 2))].tolist())
        return found

    def _write_samples(self, engine: Engine, step: int) -> None:
        """samples/step_N.jsonl: every rank writes some of the texts, rank 0 the file."""
        ranks, tokenizer = self.run.ranks, self.text.tokenizer
        mine = list(range(ranks.rank, len(self.prompts), ranks.world_size))
        with gathered_for_generation(engine) as model:
            texts = sample_texts(
                plain_model(model) if not self.config.lora.enabled else model,
                tokenizer, [self.prompts[i] for i in mine], self.config.generation, self.text.template.stop,
                seed=self.config.train.seed * 1_000_003 + step * 1009 + ranks.rank,
            )  # fmt: skip
        lines = sorted(pair for part in gather_objects(list(zip(mine, texts, strict=True))) for pair in part)
        if ranks.is_main:
            rows = [{"step": step, "prompt": tokenizer.decode(self.prompts[i]), "response": text} for i, text in lines]
            path = self.run.run_dir / "samples" / f"step_{step:08d}.jsonl"
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def targets_per_row(rows: TokenRows) -> np.ndarray:
    """(N,) trained tokens of each sequence; its first token is never one, so these are the targets."""
    return np.add.reduceat(rows.trained.astype(np.int64), rows.offsets[:-1]) if len(rows) else np.zeros(0, np.int64)


# --- figures and the end


def open_trackers(config: SftConfig, model: nn.Module, dtype: torch.dtype, run: Run, step: int) -> Trackers:
    """Where figures go: files and the terminal on rank 0."""
    trainable, total = count_parameters(model)
    embeddings = count_parameters(plain_model(model).get_input_embeddings()).total
    peak = measured_peak_flops(run.ranks.device, dtype)
    log = (
        MetricsLog(run.run_dir, config.logging, step, run.run_dir.name, to_dict(config)) if run.ranks.is_main else None
    )
    return Trackers(log, run.display, flops_per_token(trainable, total, embeddings), peak)


def finish(
    config: SftConfig, engine: Engine, text: Text, state: LoopState, run: Run, early_stopped: bool
) -> dict[str, float]:
    """Save the model (the best one with early stopping), draw the curves, print the summary, close the manifest."""
    engine.eval()
    weights = gathered_state_dict(engine, only_trainable=config.lora.enabled)
    use_best = config.train.early_stopping.patience > 0 and state.best_step is not None
    figures = dict(state.last_eval)
    if use_best and state.best_loss is not None:
        figures |= {"eval_loss": state.best_loss, "eval_perplexity": math.exp(min(state.best_loss, 700.0))}
        figures["best_step"] = float(state.best_step or 0)
    figures |= {"steps": float(state.step), "tokens": float(state.tokens), "seconds": round(state.seconds, 3)}
    if run.ranks.is_main:
        if use_best and state.best_step is not None and best_dir(run.run_dir, state.best_step).is_dir():
            put(weights, load_best(run.run_dir, state.best_step))
        write_model(config, engine.module, weights, text, run.run_dir / "model")
        remove_best(run.run_dir)
        plot = plot_losses(run.run_dir, f"rlhf sft: {run.run_dir.name}")
        figures |= last_logged(run.run_dir)
        assert run.display is not None
        run.display.stop()
        if early_stopped:
            run.say(f"stopped early after step {state.step}; the best evaluation was after step {state.best_step}")
        rows = [(name, f"{value:,.4f}".rstrip("0").rstrip(".")) for name, value in figures.items()]
        run.display.table("rlhf sft", [*rows, ("model", str(run.run_dir / "model")), ("plot", str(plot))])
    kind = ("adapter", "peft") if config.lora.enabled else ("policy", "hf")
    output = {"kind": kind[0], "task": "causal_lm", "path": "model", "format": kind[1]}
    close_run(run, status="complete", output=output, metrics=figures)
    return figures


def put(weights: dict[str, torch.Tensor], best: dict[str, torch.Tensor]) -> None:
    """Replace values in place, so that names that share a tensor (tied embeddings) change together."""
    for name, value in best.items():
        weights[name].copy_(value)


def write_model(
    config: SftConfig, model: nn.Module, weights: dict[str, torch.Tensor], text: Text, directory: Path
) -> None:
    """The final model in HF layout, or the adapter in PEFT's."""
    jinja = None if text.template.name in ("none", "tokenizer") else text.template.jinja
    if config.lora.enabled:
        base = str(Path(model_dir(str(config.model.path))[0]))
        save_adapter(model, weights, directory, text.tokenizer, base, jinja)
        return
    plain = plain_model(model)
    stop = text.template.stop[0] if text.template.stop else None
    save_model(plain.config, weights, directory, text.tokenizer, jinja, plain.generation_config, stop)


def last_logged(run_dir: Path) -> dict[str, float]:
    """The training loss and speed of the last logged step."""
    from rlhf_cli.runtime.metrics import read_metrics

    lines = list(read_metrics(run_dir))
    wanted = ("loss", "perf/tokens_per_s", "perf/peak_memory_gb", "perf/mfu")
    return {name: lines[-1][name] for name in wanted if lines and name in lines[-1]}
