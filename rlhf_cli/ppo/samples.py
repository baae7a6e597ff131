"""Responses for people to read: all of an iteration in samples/, a few in the terminal and in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_cli.align.collect import Answer, Judged
from rlhf_cli.align.samples import show_samples
from rlhf_cli.files import write_text
from rlhf_cli.ops.kl import kl_estimate
from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.ppo.experience import Experience
from rlhf_cli.run import Run
from rlhf_cli.runtime.metrics import MetricsLog


def write_samples(
    answers: Sequence[Answer], judged: Judged, experience: Experience, iteration: int, run: Run, log: MetricsLog
) -> None:
    """samples/iteration_N.jsonl, a table and TensorBoard text. Rank 0 only. iteration: so many are behind the policy
    that wrote them."""
    kl = masked_sum(kl_estimate(experience.logprobs, experience.ref_logprobs, "k1"), experience.keep_mask, dim=-1)
    rows = [_row(answer, judged, i, kl, experience.scores, iteration) for i, answer in enumerate(answers)]
    path = run.run_dir / "samples" / f"iteration_{iteration:08d}.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    cells = [[row["prompt"], row["response"], f"{row['score']:.3f}", f"{row['kl']:.2f}"] for row in rows]
    show_samples(("prompt", "response", "score", "KL"), cells, iteration, run, log)


def _row(answer: Answer, judged: Judged, i: int, kl: Tensor, scores: Tensor, iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "prompt": answer.prompt.text,
        "response": answer.response.text,
        "score": scores[i].item(),
        "reward": judged.reward[i].item(),
        **{f"reward/{name}": values[i].item() for name, values in judged.by_source.items()},
        "rules": [name for name, hit in judged.rules.hits.items() if hit[i]],
        "kl": kl[i].item(),
        "tokens": len(answer.response.token_ids),
        "ending": answer.response.ending,
    }
