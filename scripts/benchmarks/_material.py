"""The tokenizer, the texts and the model that all compared programs train on; the same bytes for a seed.

python _material.py '{"out": ..., "documents": 256, "hidden": ..., ...}'      see make_material in sft.py and rm.py
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _probe import job_from_argv
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rlhf_cli.data.plan import epoch_order
from rlhf_cli.models.reward import new_reward_model
from rlhf_cli.models.scratch import gated_width, new_model
from rlhf_cli.models.tokenizer import train_tokenizer

ZIPF_EXPONENT = 1.0  # word frequencies of natural text (Zipf 1949)
LENGTH_SIGMA = 0.8  # of the log-normal lengths: the middle 80 % span a factor of eight, as in instruction data
LONGEST_PROMPT = 0.75  # of max_length: the answers need room


class Language(NamedTuple):
    """words; weights (W,): how often each is used, relatively; tokens (W,) that each takes; tokenizer."""

    words: list[str]
    weights: np.ndarray
    tokens: np.ndarray
    tokenizer: PreTrainedTokenizerFast


def main(job: dict[str, Any]) -> None:
    """Write model/ with its tokenizer, documents.jsonl or pairs.jsonl in file order, in_order.jsonl as `rlhf` visits
    them, and tokens.json, how many there are."""
    out = Path(job["out"])
    rng = random.Random(job["seed"])
    language = make_language(rng, job["vocab"])
    kind, make = ("pairs", pairs) if "pairs" in job else ("documents", documents)
    rows = make(job, rng, language)
    write_rows(out / f"{kind}.jsonl", rows)
    # The others read the rows one after the other, so that every program sees the same rows in the same step.
    write_rows(out / "in_order.jsonl", [rows[i] for i in epoch_order(len(rows), None, job["seed"], 0)])
    tokens = sum(count_tokens(language, row) for row in rows)
    (out / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    language.tokenizer.save_pretrained(out / "model")
    if job["weights"]:
        write_model(job, language.tokenizer, out / "model")


# --- language


def make_language(rng: random.Random, vocab: int) -> Language:
    words = pseudo_words(rng, 2 * vocab)
    weights = 1.0 / np.arange(1, len(words) + 1) ** ZIPF_EXPONENT
    tokenizer = train_tokenizer("bpe", sample_lines(rng, words, weights), vocab)
    tokens = [len(ids) for ids in tokenizer([" " + w for w in words], add_special_tokens=False).input_ids]
    return Language(words, weights, np.array(tokens), tokenizer)


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


def text(rng: random.Random, language: Language, length: int) -> str:
    """Words of at most `length` tokens together with an EOS, but at least one word."""
    picked = rng.choices(range(len(language.words)), language.weights.tolist(), k=length)
    fitting = int(np.searchsorted(np.cumsum(language.tokens[picked]), length - 1, side="right"))
    return " " + " ".join(language.words[i] for i in picked[: max(1, fitting)])


# --- rows


def documents(job: dict[str, Any], rng: random.Random, language: Language) -> list[dict[str, str]]:
    """Texts whose tokens (with EOS) follow a log-normal law cut to [min_length, max_length]."""
    lengths = np.random.default_rng(job["seed"]).lognormal(np.log(job["median_length"]), LENGTH_SIGMA, job["documents"])
    lengths = np.clip(lengths, job["min_length"], job["max_length"]).astype(int)
    return [{"text": text(rng, language, int(length))} for length in lengths]


def pairs(job: dict[str, Any], rng: random.Random, language: Language) -> list[dict[str, str]]:
    """Prompts with two answers each, all lengths log-normal with the means mean_prompt and mean_answer (the answers
    with EOS) before they are cut so that prompt and answer have min_length to max_length tokens together."""
    draw, count = np.random.default_rng(job["seed"]), job["pairs"]
    one_word = int(language.tokens.max()) + 1  # so that the first word of a text fits, whatever it is
    prompts = log_normal(draw, job["mean_prompt"], count).clip(one_word, LONGEST_PROMPT * job["max_length"]).astype(int)
    rows = []
    for prompt, wanted in zip(prompts.tolist(), log_normal(draw, job["mean_answer"], (count, 2)), strict=True):
        least = max(one_word, job["min_length"] - prompt)
        chosen, rejected = (int(length) for length in wanted.clip(least, job["max_length"] - prompt))
        sides = (text(rng, language, length) for length in (prompt + 1, chosen, rejected))  # a prompt has no EOS
        rows.append(dict(zip(("prompt", "chosen", "rejected"), sides, strict=True)))
    return rows


def log_normal(draw: np.random.Generator, mean: float, shape: int | tuple[int, ...]) -> np.ndarray:
    """Draws of this mean, which is exp(median's logarithm + sigma² / 2)."""
    return draw.lognormal(np.log(mean) - LENGTH_SIGMA**2 / 2, LENGTH_SIGMA, shape)


def sequences(row: dict[str, str]) -> list[str]:
    """The texts that a row puts through the model: a document, or a prompt with each of its answers."""
    return [row["text"]] if "text" in row else [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]


def count_tokens(language: Language, row: dict[str, str]) -> int:
    """Tokens of a row's sequences, each with its EOS."""
    return sum(len(ids) + 1 for ids in language.tokenizer(sequences(row)).input_ids)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- model


def write_model(job: dict[str, Any], tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """A Llama with random weights, as safetensors; for pairs one with a head for scores."""
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
    if "pairs" in job:
        model = new_reward_model(config, None, torch.float32, job["seed"])
    else:
        model = new_model(config, torch.float32, job["seed"])
    model.save_pretrained(directory)


if __name__ == "__main__":
    main(job_from_argv())
