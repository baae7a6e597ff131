"""The model, the tokenizer and the ragged documents that all compared programs train on; the same bytes for a seed.

python _material.py '{"out": ..., "hidden": ..., ...}'      see Material in sft.py for the settings
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _probe import job_from_argv
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf_cli.data.plan import epoch_order
from rlhf_cli.models.scratch import gated_width, new_model
from rlhf_cli.models.tokenizer import train_tokenizer

ZIPF_EXPONENT = 1.0  # word frequencies of natural text (Zipf 1949)
LENGTH_SIGMA = 0.8  # of the log-normal lengths: the middle 80 % span a factor of eight, as in instruction data


def main(job: dict[str, Any]) -> None:
    """Write model/ with its tokenizer, documents.jsonl in file order, in_order.jsonl as `rlhf sft` visits them, and
    tokens.json, how many there are."""
    out = Path(job["out"])
    rng = random.Random(job["seed"])
    words = pseudo_words(rng, 2 * job["vocab"])
    weights = 1.0 / np.arange(1, len(words) + 1) ** ZIPF_EXPONENT
    tokenizer = train_tokenizer("bpe", sample_lines(rng, words, weights), job["vocab"])
    documents = ragged_documents(job, rng, words, weights, tokenizer)
    write_rows(out / "documents.jsonl", documents)
    # The others read the rows one after the other, so that every program sees the same rows in the same step.
    order = epoch_order(len(documents), None, job["seed"], 0)
    write_rows(out / "in_order.jsonl", [documents[i] for i in order])
    tokens = sum(len(ids) + 1 for ids in tokenizer(documents).input_ids)  # each document with its EOS
    (out / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    tokenizer.save_pretrained(out / "model")
    if job["weights"]:
        write_model(job, tokenizer, out / "model")


def pseudo_words(rng: random.Random, count: int) -> list[str]:
    """Different words of two to four syllables."""
    syllables = [c + v + e for c in string.ascii_lowercase for v in "aeiou" for e in ("", "n", "r", "st")]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(syllables, k=rng.randint(2, 4)))] = None
    return list(found)


def sample_lines(rng: random.Random, words: list[str], weights: np.ndarray) -> list[str]:
    """Text for the tokenizer: each word at least once, frequent ones more often."""
    return [" ".join(words), *(" ".join(rng.choices(words, weights.tolist(), k=1000)) for _ in range(200))]


def ragged_documents(
    job: dict[str, Any], rng: random.Random, words: list[str], weights: np.ndarray, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """Documents whose tokens (with EOS) follow a log-normal law cut to [min_length, max_length]."""
    cost = np.array([len(ids) for ids in tokenizer([" " + w for w in words], add_special_tokens=False).input_ids])
    lengths = np.random.default_rng(job["seed"]).lognormal(np.log(job["median_length"]), LENGTH_SIGMA, job["documents"])
    documents = []
    for length in np.clip(lengths, job["min_length"], job["max_length"]).astype(int):
        picked = rng.choices(range(len(words)), weights.tolist(), k=int(length))
        fitting = int(np.searchsorted(np.cumsum(cost[picked]), length - 1, side="right"))
        documents.append(" " + " ".join(words[i] for i in picked[: max(1, fitting)]))
    return documents


def write_rows(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def write_model(job: dict[str, Any], tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """A Llama with random weights, as safetensors."""
    config = LlamaConfig(
        vocab_size=job["vocab"],
        hidden_size=job["hidden"],
        intermediate_size=gated_width(job["hidden"]),
        num_hidden_layers=job["layers"],
        num_attention_heads=job["heads"],
        num_key_value_heads=job["heads"],
        max_position_embeddings=max(1024, job["max_length"]),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    new_model(config, torch.float32, job["seed"]).save_pretrained(directory)


if __name__ == "__main__":
    main(job_from_argv())
