"""The language-model objective: token cross-entropy over the global batch, held-out loss, sample texts."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import torch

from rlhf_cli.assemble import Text
from rlhf_cli.data import plan
from rlhf_cli.data.collate import collate
from rlhf_cli.data.dataset import Prepared
from rlhf_cli.data.rows import Message
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.data.tokenize import encode_prompt, make_encoder
from rlhf_cli.files import write_text
from rlhf_cli.loop import Conclusion, Micro, StepData, heed_stop
from rlhf_cli.rollout.sampler import Request, generate
from rlhf_cli.run import Run
from rlhf_cli.runtime.distributed import gather_objects, sum_over_ranks
from rlhf_cli.runtime.engine import Engine, gathered_for_generation
from rlhf_cli.schema import SftConfig

TEXT_PROMPT_TOKENS = 16  # of a plain evaluation text, as the prompt of a sample


class LanguageModelObjective:
    """Token cross-entropy over the global batch, evaluation on held-out rows, and samples."""

    def __init__(self, config: SftConfig, data: Prepared, text: Text, run: Run):
        self.config, self.text, self.run = config, text, run
        self.rows, self.eval_rows = data.train, data.eval
        settings = config.train
        self.course = plan.Course(len(data.train), data.train.repeats, settings.global_batch_size, settings.seed)
        self.total_steps = plan.num_steps(
            self.course.per_epoch, settings.global_batch_size, settings.epochs, settings.max_steps
        )
        self.flatten = config.data.packing and config.model.attn_implementation.startswith("flash")
        self.prompts = self._prompts()
        self._eval_targets = 0 if data.eval is None else data.eval.num_trained(range(len(data.eval)))

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return self.course.epoch(step)

    def step_data(self, step: int) -> StepData[plan.MicroBatch]:
        """The global batch of a step; this rank's part of it as micro-batches of row numbers."""
        rows = self.course.rows(step)
        micro_batches = self._spread(self.rows, rows, self.config.data.packing)
        return StepData(
            micro_batches, float(self.rows.num_trained(rows)), int(self.rows.lengths[rows].sum()), len(rows)
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
            began = time.monotonic()
            self._write_samples(engine, step)
            figures["perf/generate_s"] = time.monotonic() - began
        return figures

    def conclude(self, engine: Engine, step: int) -> Conclusion:
        """Nothing beyond the evaluations."""
        return Conclusion()

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
        return engine.forward(
            input_ids=batch.input_ids.to(device, non_blocking=True),
            position_ids=batch.position_ids.to(device, non_blocking=True),
            targets=batch.targets.to(device, non_blocking=True),
        ).loss_sum

    @torch.no_grad()
    def _eval_loss(self, engine: Engine, source: TokenRows) -> float:
        engine.eval()
        total = torch.zeros((), device=self.run.ranks.device, dtype=torch.float64)
        for rows in plan.windows(len(source), self.config.train.micro_batch_size, self.run.ranks.world_size):
            heed_stop(self.run.process.watch)
            for micro_batch in self._spread(source, rows, self.config.data.packing):
                total += self._loss(engine, source, micro_batch).double()
        engine.train()
        return sum_over_ranks(total).item() / self._eval_targets

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
        ranks, tokenizer, generation = self.run.ranks, self.text.tokenizer, self.config.generation
        mine = list(range(ranks.rank, len(self.prompts), ranks.world_size))
        requests = [Request(np.array(self.prompts[i], np.int32), i, generation.max_new_tokens) for i in mine]
        seed = self.config.train.seed * 1_000_003 + step
        with gathered_for_generation(engine) as model:
            responses = generate(model, tokenizer, requests, generation, self.text.template.stop, seed)
        texts = [response.text for response in responses]
        lines = sorted(pair for part in gather_objects(list(zip(mine, texts, strict=True))) for pair in part)
        if ranks.is_main:
            rows = [{"step": step, "prompt": tokenizer.decode(self.prompts[i]), "response": text} for i, text in lines]
            path = self.run.run_dir / "samples" / f"step_{step:08d}.jsonl"
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
