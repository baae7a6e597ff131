"""Responses for people to read: all of an iteration in samples/, a few in the terminal and in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_cli.files import write_text
from rlhf_cli.ops.kl import kl_estimate
from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.ppo.batch import Experience
from rlhf_cli.ppo.collect import Answer, Judged
from rlhf_cli.run import Run
from rlhf_cli.runtime.metrics import MetricsLog

SHOWN_CHARS = 240  # of a prompt's end and a response in the terminal


def write_samples(
    answers: Sequence[Answer], judged: Judged, experience: Experience, iteration: int, run: Run, log: MetricsLog
) -> None:
    """samples/iteration_N.jsonl, a table and TensorBoard text. Rank 0 only. iteration: so many are behind the policy
    that wrote them."""
    kl = masked_sum(kl_estimate(experience.logprobs, experience.ref_logprobs, "k1"), experience.keep_mask, dim=-1)
    rows = [_row(answer, judged, i, kl, experience.scores, iteration) for i, answer in enumerate(answers)]
    path = run.run_dir / "samples" / f"iteration_{iteration:08d}.jsonl"
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    # Spread over the responses: neighbours may answer the same prompt.
    count = min(run.config.logging.num_log_samples, len(rows))
    shown = [rows[i * len(rows) // count] for i in range(count)]
    cells = [[_end(row["prompt"]), _start(row["response"]), f"{row['score']:.3f}", f"{row['kl']:.2f}"] for row in shown]
    assert run.display is not None
    run.display.grid(f"iteration {iteration}", ["prompt", "response", "score", "KL"], cells)
    table = "\n".join(f"| {' | '.join(_cell(c) for c in row)} |" for row in cells)
    log.text("samples", f"| prompt | response | score | KL |\n|---|---|---|---|\n{table}", iteration)


def _row(answer: Answer, judged: Judged, i: int, kl: Tensor, scores: Tensor, iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "prompt": answer.prompt.text,
        "response": answer.response.text,
        "score": scores[i].item(),
        "reward": judged.reward[i].item(),
        **{f"reward/{name}": values[i].item() for name, values in judged.by_source.items()},
        "rules": [name for name, hit in judged.hits.items() if hit[i]],
        "kl": kl[i].item(),
        "tokens": len(answer.response.token_ids),
        "ending": answer.response.ending,
    }


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else "…" + text[-SHOWN_CHARS:]


def _start(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
