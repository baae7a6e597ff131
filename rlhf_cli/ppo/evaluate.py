"""What is measured beside the rollouts: reward on held-out prompts, and the alignment tax on held-out text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.prompts import Prompt
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.files import write_text
from rlhf_cli.lm_loss import mean_token_loss
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.ops.diversity import distinct_n
from rlhf_cli.ppo.collect import Answer, Collector, Judged, evaluation_requests, evaluation_sampling
from rlhf_cli.ppo.models import Models
from rlhf_cli.run import Run
from rlhf_cli.schema import DataConfig, PpoConfig


@dataclass
class Evaluation:
    """prompts: held-out ones, None without; tax: tokens of held-out text, None without."""

    prompts: Sequence[Prompt] | None
    tax: TokenRows | None

    def __bool__(self) -> bool:
        return self.prompts is not None or self.tax is not None


def open_evaluation(config: PpoConfig, prompts: Sequence[Prompt] | None, models: Models, run: Run) -> Evaluation:
    """The held-out prompts that are used, and the text of eval.tax_path."""
    held_out = None if prompts is None else prompts[: config.eval.num_prompts]
    if config.eval.tax_path is None:
        return Evaluation(held_out, None)
    text = models.text
    positions = models.positions
    data = DataConfig(
        path=config.eval.tax_path, limit=config.eval.tax_rows, template=config.data.template,
        max_length=min(positions, 1024), overlong="truncate",
    )  # fmt: skip
    rows = prepare(data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, run.say).train
    return Evaluation(held_out, rows)


def evaluate(evaluation: Evaluation, collector: Collector, iteration: int) -> dict[str, float]:
    """eval_...: figures after `iteration` iterations, the same on every rank. Raises StopAsked."""
    config, models, run = collector.config, collector.models, collector.run
    figures: dict[str, float] = {}
    if evaluation.prompts is not None:
        responses = collector.write(
            evaluation_requests(evaluation.prompts, config.generation), evaluation_sampling(config)
        )
        answers = [Answer(evaluation.prompts[i], response, i) for i, response in responses.items()]
        judged = collector.judge(answers)
        figures |= _answer_figures(answers, judged)
        if run.ranks.is_main:
            _write_answers(answers, judged, run, iteration)
    if evaluation.tax is not None:
        loss = mean_token_loss(models.policy, evaluation.tax, models.text.tokenizer.pad_token_id,
                               config.train.micro_batch_size, run.ranks, run.process.watch)  # fmt: skip
        figures |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    return figures


def _answer_figures(answers: Sequence[Answer], judged: Judged) -> dict[str, float]:
    count = len(answers)
    tokens = [a.response.token_ids[: a.response.num_text_tokens].tolist() for a in answers]
    figures = {
        "eval_reward": judged.score.mean().item(),
        "eval_reward_stderr": judged.score.std().item() / math.sqrt(count) if count > 1 else 0.0,
        "eval_length": sum(len(a.response.token_ids) for a in answers) / count,
        "eval_distinct_2": distinct_n(tokens, 2),
    }
    figures |= {f"eval_reward/{name}": values.mean().item() for name, values in judged.by_source.items()}
    return figures | {f"eval_rules/{name}": hit.double().mean().item() for name, hit in judged.hits.items()}


def _write_answers(answers: Sequence[Answer], judged: Judged, run: Run, iteration: int) -> None:
    rows = [
        {
            "iteration": iteration,
            "prompt": answer.prompt.text,
            "response": answer.response.text,
            "score": judged.score[i].item(),
            **{f"reward/{name}": values[i].item() for name, values in judged.by_source.items()},
            "ending": answer.response.ending,
        }
        for i, answer in enumerate(answers)
    ]
    path = run.run_dir / "samples" / f"eval_{iteration:08d}.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
