"""The loop that everybody writes first: pad to the longest, full logits, AdamW."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from _probe import Probe, high_water_mib, job_from_argv
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama  # noqa: F401  before memory is read: the import is lazy


def main(job: dict[str, Any]) -> None:
    probe = Probe(high_water_mib(), versions={"torch": torch.__version__, "transformers": transformers.__version__})
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lines = Path(job["data"]).read_text(encoding="utf-8").splitlines()
    rows = [[*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id] for line in lines]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0)
    low_precision = torch.autocast("cpu", torch.bfloat16) if job["dtype"] == "bf16" else nullcontext()
    size, micro = job["global_batch"], job["micro_batch"]
    for step in range(job["steps"]):
        batch = rows[step * size : (step + 1) * size]
        targets = sum(len(row) - 1 for row in batch)
        total = 0.0
        for start in range(0, size, micro):
            with low_precision:
                loss = micro_loss(model, batch[start : start + micro], tokenizer.pad_token_id) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        probe.tokens.append(sum(len(row) for row in batch))
        probe.losses.append(total)
        probe.step_ended()
    probe.write(job["result"])


def micro_loss(model: Any, rows: list[list[int]], pad: int) -> torch.Tensor:
    """Σ token losses of rows padded to the longest."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


if __name__ == "__main__":
    main(job_from_argv())
