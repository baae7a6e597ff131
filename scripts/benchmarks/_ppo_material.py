"""The policy and the prompts that all compared PPO programs work on; the same bytes for a seed.

python _ppo_material.py '{"out": ..., "prompts": 256, "hidden": ..., ...}'      see make_material in ppo.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _material import Language, log_normal, make_language, write_model, write_rows
from _probe import job_from_argv
from transformers import AutoModelForCausalLM

from rlhf_cli.data.plan import epoch_order

FEWEST_WORDS = 32  # of one token; below that all prompts would look alike
PROBES, BISECTIONS = 64, 30  # random texts that ends are measured on; halvings of the logit, from 100 to 1e-7


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
    if job["mean_share"] is not None:
        make_ends_likely(out / "model", job, language.tokenizer.eos_token_id)


def prompts(job: dict[str, Any], rng: random.Random, language: Language) -> list[str]:
    """Texts of exactly job["prompt"] tokens, or of log-normal lengths up to that, with job["mean_share"] of it as the
    mean before they are cut."""
    lengths = np.full(job["prompts"], job["prompt"])
    if job["mean_share"] is not None:
        mean = job["mean_share"] * job["prompt"]
        draws = log_normal(np.random.default_rng(job["seed"]), mean, job["prompts"])
        lengths = draws.clip(1, job["prompt"]).astype(int)
    words = [word for word, tokens in zip(language.words, language.tokens.tolist(), strict=True) if tokens == 1]
    assert len(words) >= FEWEST_WORDS, f"{len(words)} words of one token; a larger vocabulary has more"
    texts = [" " + " ".join(rng.choices(words, k=length)) for length in lengths.tolist()]
    assert [len(ids) for ids in language.tokenizer(texts).input_ids] == lengths.tolist()
    return texts


@torch.no_grad()
def make_ends_likely(directory: Path, job: dict[str, Any], eos: int) -> None:
    """Change the policy so that a text ends after about job["mean_share"] of its longest length.

    One feature gets the same value in all embeddings, so that states in front of the head have much in common; EOS's
    row is their mean. Then an end has nearly the same probability everywhere, and lengths are geometric. (A random row
    would read what hardly changes along a text: some would end at once, most never.)
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = embeddings.std() * job["hidden"] ** 0.5  # as long as all other features together
    draw = torch.Generator().manual_seed(job["seed"])
    hidden = model.model(torch.randint(job["vocab"], (PROBES, job["response"]), generator=draw)).last_hidden_state
    logits = model.lm_head(hidden)
    logits[..., eos] = -torch.inf
    others = logits.logsumexp(-1)
    row = hidden.mean((0, 1))
    row /= row.norm() ** 2  # its product with a state is 1 on average
    wanted = 1 / (job["mean_share"] * job["response"])
    low, high = 0.0, 100.0
    for _ in range(BISECTIONS):
        logit = (low + high) / 2
        share = torch.sigmoid(hidden @ row * logit - others).mean().item()
        low, high = (logit, high) if share < wanted else (low, logit)
    model.lm_head.weight[eos] = row * high
    model.save_pretrained(directory)


if __name__ == "__main__":
    main(job_from_argv())
