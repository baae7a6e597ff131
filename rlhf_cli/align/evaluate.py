"""What is measured beside the rollouts: reward on held-out prompts, and the alignment tax on held-out text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_cli.align.collect import Answer, Collector, Judged, evaluation_requests, evaluation_sampling
from rlhf_cli.align.models import Models
from rlhf_cli.data.dataset import prepare
from rlhf_cli.data.prompts import Prompt
from rlhf_cli.data.token_rows import TokenRows
from rlhf_cli.files import write_text
from rlhf_cli.lm_loss import mean_token_loss
from rlhf_cli.models.tokenizer import tokenizer_digest
from rlhf_cli.ops.diversity import distinct_n
from rlhf_cli.run import Run
from rlhf_cli.runtime.distributed import local_first
from rlhf_cli.schema import AlignedConfig, DataConfig

TAX_LENGTH = 1024  # tokens of a row of held-out text that count


@dataclass
class Evaluation:
    """prompts: held-out ones, None without; tax: tokens of held-out text, None without."""

    prompts: Sequence[Prompt] | None
    tax: TokenRows | None

    def __bool__(self) -> bool:
        return self.prompts is not None or self.tax is not None


def open_evaluation(config: AlignedConfig, prompts: Sequence[Prompt] | None, models: Models, run: Run) -> Evaluation:
    """The held-out prompts that are used, and the text of eval.tax_path."""
    held_out = None if prompts is None else prompts[: config.eval.num_prompts]
    if config.eval.tax_path is None:
        return Evaluation(held_out, None)
    data = DataConfig(
        path=config.eval.tax_path, limit=config.eval.tax_rows, template=config.data.template,
        max_length=min(models.positions, TAX_LENGTH), overlong="truncate",
    )  # fmt: skip
    text = models.text
    with local_first(run.ranks):  # the others find its tokens in the cache
        report = run.say if run.ranks.is_main else print
        rows = prepare(data, text.tokenizer, tokenizer_digest(text.tokenizer), text.template, report).train
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
        if config.stage == "raft" and "eval_reward" in figures:  # under the name that its other rewards have
            figures |= {f"raft/reward_eval{end}": figures[f"eval_reward{end}"] for end in ("", "_stderr")}
        if run.ranks.is_main:
            _write_answers(answers, judged, run, iteration)
    if evaluation.tax is not None:
        loss = mean_token_loss(models.policy, evaluation.tax, models.text.tokenizer.pad_token_id,
                               config.train.micro_batch_size, run.ranks, run.process.watch)  # fmt: skip
        figures |= {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
    return figures


def _answer_figures(answers: Sequence[Answer], judged: Judged) -> dict[str, float]:
    """No reward without a source."""
    count, scores = len(answers), judged.with_rules(judged.reward)
    tokens = [a.response.token_ids[: a.response.num_text_tokens].tolist() for a in answers]
    figures = {}
    if judged.by_source:
        figures["eval_reward"] = scores.mean().item()
        figures["eval_reward_stderr"] = scores.std().item() / math.sqrt(count) if count > 1 else 0.0
    figures["eval_length"] = sum(len(a.response.token_ids) for a in answers) / count
    figures["eval_distinct_2"] = distinct_n(tokens, 2)
    figures |= {f"eval_reward/{name}": values.mean().item() for name, values in judged.by_source.items()}
    return figures | {f"eval_rules/{name}": hit.double().mean().item() for name, hit in judged.rules.hits.items()}


def _write_answers(answers: Sequence[Answer], judged: Judged, run: Run, iteration: int) -> None:
    scores = judged.with_rules(judged.reward)
    rows = [
        {
            "iteration": iteration,
            "prompt": answer.prompt.text,
            "response": answer.response.text,
            **({"score": scores[i].item()} if judged.by_source else {}),
            **{f"reward/{name}": values[i].item() for name, values in judged.by_source.items()},
            "ending": answer.response.ending,
        }
        for i, answer in enumerate(answers)
    ]
    path = run.run_dir / "samples" / f"eval_{iteration:08d}.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
