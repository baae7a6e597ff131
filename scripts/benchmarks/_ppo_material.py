"""The policy and the prompts that all compared PPO programs work on; the same bytes for a seed.

python _ppo_material.py '{"out": ..., "prompts": 256, "hidden": ..., ...}'      see make_material in ppo.py
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _material import Language, log_normal, make_language, write_model, write_rows
from _probe import job_from_argv
from safetensors.torch import load_file, save_file

from rlhf_cli.data.plan import epoch_order

FEWEST_WORDS = 32  # of one token; below that all prompts would look alike


def main(job: dict[str, Any]) -> None:
    """Write model/ with its tokenizer, prompts.jsonl in file order, in_order.jsonl as `rlhf` visits them, and
    pairs.jsonl, on which a reward model can be made."""
    out = Path(job["out"])
    rng = random.Random(job["seed"])
    language = make_language(rng, job["vocab"])
    rows = [{"text": text} for text in prompts(job, rng, language)]
    write_rows(out / "prompts.jsonl", rows)
    write_rows(out / "in_order.jsonl", [rows[i] for i in epoch_order(len(rows), None, job["seed"], 0)])
    pairs = zip(rows[0::4], rows[1::4], rows[2::4], strict=False)
    write_rows(
        out / "pairs.jsonl",
        [{"prompt": a["text"], "chosen": b["text"], "rejected": c["text"]} for a, b, c in pairs],
    )
    language.tokenizer.save_pretrained(out / "model")
    write_model(job | {"max_length": job["prompt"] + job["response"]}, language.tokenizer, out / "model")
    if job["mean_response"] is not None:
        make_ends_likely(out / "model", job, language.tokenizer.eos_token_id)


def prompts(job: dict[str, Any], rng: random.Random, language: Language) -> list[str]:
    """Texts of exactly job["prompt"] tokens, or with ragged lengths up to that: log-normal, half of it on average."""
    lengths = np.full(job["prompts"], job["prompt"])
    if job["mean_response"] is not None:
        draws = log_normal(np.random.default_rng(job["seed"]), job["prompt"] / 2, job["prompts"])
        lengths = draws.clip(1, job["prompt"]).astype(int)
    words = [word for word, tokens in zip(language.words, language.tokens.tolist(), strict=True) if tokens == 1]
    assert len(words) >= FEWEST_WORDS, f"{len(words)} words of one token; a larger vocabulary has more"
    texts = [" " + " ".join(rng.choices(words, k=length)) for length in lengths.tolist()]
    assert [len(ids) for ids in language.tokenizer(texts).input_ids] == lengths.tolist()
    return texts


def make_ends_likely(model: Path, job: dict[str, Any], eos: int) -> None:
    """Give EOS a row in the head with which a text ends after about job["mean_response"] tokens.

    Hidden states in front of the head have the norm √H, so with weights from N(0, s²/H) the logit of EOS is N(0, s²)
    over positions, the mean of its exponential e^(s²/2), and its share about that of V words that have e^0 each.
    """
    spread = math.sqrt(2 * math.log(max(job["vocab"] / job["mean_response"], 1.0)))
    weights = load_file(model / "model.safetensors")
    row = torch.randn(job["hidden"], generator=torch.Generator().manual_seed(job["seed"]))
    weights["lm_head.weight"][eos] = row * spread / math.sqrt(job["hidden"])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(job_from_argv())
