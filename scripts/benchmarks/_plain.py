"""The loop that everybody writes first: pad to the longest, everything in one call, AdamW."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from _probe import Probe, high_water_mib, job_from_argv
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.llama import modeling_llama  # noqa: F401  before memory is read: the import is lazy

Row = list[list[int]]  # its sequences: a document, or the chosen and the rejected text


class Stage(NamedTuple):
    """texts: the sequences of a line of the file; loss_sum(model, rows, pad): of a micro-batch, not yet divided; terms:
    what a row adds to the divisor."""

    auto_model: Any
    texts: Callable[[dict[str, str]], list[str]]
    loss_sum: Callable[[Any, list[Row], int], torch.Tensor]
    terms: Callable[[Row], int]


def main(job: dict[str, Any]) -> None:
    probe = Probe(high_water_mib(), versions={"torch": torch.__version__, "transformers": transformers.__version__})
    stage = STAGES[job["stage"]]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()
    texts = [stage.texts(json.loads(line)) for line in lines]
    rows = [[[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in row] for row in texts]
    model = stage.auto_model.from_pretrained(job["model"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0)
    low_precision = torch.autocast("cpu", torch.bfloat16) if job["dtype"] == "bf16" else nullcontext()
    size, micro = job["global_batch"], job["micro_batch"]
    for step in range(job["steps"]):
        batch = rows[step * size : (step + 1) * size]
        divisor = sum(stage.terms(row) for row in batch)
        total = 0.0
        for start in range(0, size, micro):
            with low_precision:
                loss = stage.loss_sum(model, batch[start : start + micro], tokenizer.pad_token_id) / divisor
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        probe.tokens.append(sum(len(sequence) for row in batch for sequence in row))
        probe.samples.append(len(batch))
        probe.losses.append(total)
        probe.step_ended()
    probe.write(job["result"])


def token_losses(model: Any, rows: list[Row], pad: int) -> torch.Tensor:
    """Σ token losses of documents."""
    ids, mask = padded([document for (document,) in rows], pad)
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def pair_losses(model: Any, rows: list[Row], pad: int) -> torch.Tensor:
    """Σ −log σ(chosen − rejected) of pairs, all sequences in one call."""
    ids, mask = padded([chosen for chosen, _ in rows] + [rejected for _, rejected in rows], pad)
    chosen, rejected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().chunk(2)
    return -F.logsigmoid(chosen - rejected).sum()


def padded(sequences: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (N, T) padded to the longest, and 1 where they are no padding (N, T)."""
    width = max(len(ids) for ids in sequences)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    return ids, mask


STAGES = {
    "sft": Stage(AutoModelForCausalLM, lambda row: [row["text"]], token_losses, lambda row: len(row[0]) - 1),
    "rm": Stage(
        AutoModelForSequenceClassification,
        lambda row: [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]],
        pair_losses,
        lambda row: 1,
    ),
}


if __name__ == "__main__":
    main(job_from_argv())
