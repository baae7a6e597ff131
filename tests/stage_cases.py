"""Stages inside the ranks of a test pool: configs from words as on the command line, tiny data made here."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch

from rlhf_cli.config.compose import compose_stage
from rlhf_cli.config.freeze import freeze
from rlhf_cli.runtime.distributed import Ranks, barrier
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.stop import StopWatch
from rlhf_cli.stages import ppo, rm, sft

NOUNS = ["river", "king", "horse", "garden", "letter", "storm", "sword", "rose"]
VERBS = ["sees", "takes", "loves", "fears", "follows"]


def write_dialogues(path: Path, rows: int = 40, seed: int = 0) -> Path:
    """Ragged prompt/response rows of a small language."""
    draw = random.Random(seed)
    sentence = lambda: f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"
    lines = []
    for _ in range(rows):
        answer = ", ".join(sentence() for _ in range(draw.randint(1, 4)))
        lines.append(json.dumps({"prompt": f"{sentence()}?", "response": f"{answer}."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words(data: Path, **more: Any) -> list[str]:
    """A run of a tiny Llama from scratch on `data`; more: option=value, `__` for the dot."""
    base: dict[str, Any] = {
        "model.init": "scratch",
        "model.arch.hidden_size": 32,
        "model.arch.num_layers": 4,
        "model.arch.num_heads": 2,
        "model.arch.intermediate_size": 48,
        "model.tokenizer.train": "char",
        "data.path": data,
        "data.template": "hh",
        "data.max_length": 256,
        "data.cache_dir": data.parent / "cache",
        "optim.lr": 0.01,
        "optim.weight_decay": 0.1,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.max_steps": 12,
        "generation.num_prompts": 0,
        "logging.tensorboard": "false",
        "logging.progress": "none",
    }
    base |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in base.items()]


POLITE = ["please", "thank you", "kindly", "certainly"]


def write_pairs(path: Path, rows: int = 200, seed: int = 0, flipped: float = 0.0) -> Path:
    """Prompts with two answers of equal kind and length, of which the chosen one has a polite word in it; the sides of
    a share `flipped` of the rows are exchanged at random."""
    draw = random.Random(seed)
    sentence = lambda: f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"
    lines = []
    for _ in range(rows):
        polite, plain = sentence().split(), [*sentence().split(), draw.choice(["indeed", "often", "again", "now"])]
        polite.insert(draw.randint(0, len(polite)), draw.choice(POLITE))
        sides = [" ".join(polite), " ".join(plain)]
        if draw.random() < flipped / 2:
            sides.reverse()
        lines.append(json.dumps({"prompt": f"{sentence()}?", "chosen": sides[0], "rejected": sides[1]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rm_words(data: Path, **more: Any) -> list[str]:
    """As words, for `rlhf rm`."""
    settings = {"model__tokenizer__train": "word", "data__validation_split_percentage": 25, "optim__lr": 0.003} | more
    return [w for w in words(data, **settings) if not w.startswith("generation.")]


def write_prompts(path: Path, rows: int = 40, seed: int = 0) -> Path:
    """Prompts of the small language, with a column for functions."""
    draw = random.Random(seed)
    sentence = lambda: f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"
    lines = [json.dumps({"prompt": f"{sentence()}?", "reference": f"{sentence()}."}) for _ in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


LETTER_E = """
def share_of_e(prompts, responses, **columns):
    return [response.count("e") / max(1, len(response)) for response in responses]
"""


def write_letter_reward(folder: Path) -> str:
    """A Python function that likes the letter e, as a reward source."""
    (folder / "letters.py").write_text(LETTER_E, encoding="utf-8")
    return f"{{type: function, path: {folder / 'letters.py'}, function: share_of_e}}"


def ppo_words(policy: Path, prompts: Path, sources: str, **more: Any) -> list[str]:
    """A short PPO run of a tiny policy; more: option=value, `__` for the dot."""
    base: dict[str, Any] = {
        "model.path": policy,
        "data.path": prompts,
        "data.validation_split_percentage": 20,
        "generation.max_new_tokens": 12,
        "reward.sources": f"[{sources}]",
        "optim.lr": 0.001,
        "ppo.num_iterations": 4,
        "ppo.rollout_batch_size": 16,
        "ppo.num_mini_batches": 2,
        "ppo.ppo_epochs": 2,
        "train.micro_batch_size": 4,
        "logging.tensorboard": "false",
        "logging.progress": "none",
    }
    base |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in base.items()]


def quiet_process(ranks: Ranks, run_dir: Path) -> RankProcess:
    return RankProcess(ranks.rank, ranks.local_rank, ranks.world_size, io.StringIO(), StopWatch(run_dir, ranks.rank))


def run_sft(ranks: Ranks, run_dir: str, overrides: list[str]) -> dict[str, float]:
    """What a rank of `rlhf sft *overrides run_dir=...` does; returns the final figures."""
    config, where = start("sft", ranks, run_dir, overrides)
    return sft.fine_tune(config, where, quiet_process(ranks, where), ranks)


def run_rm(ranks: Ranks, run_dir: str, overrides: list[str]) -> dict[str, float]:
    """What a rank of `rlhf rm *overrides run_dir=...` does; returns the final figures."""
    config, where = start("rm", ranks, run_dir, overrides)
    return rm.fit(config, where, quiet_process(ranks, where), ranks)


def run_ppo(ranks: Ranks, run_dir: str, overrides: list[str]) -> dict[str, float]:
    """What a rank of `rlhf ppo *overrides run_dir=...` does; returns the final figures."""
    config, where = start("ppo", ranks, run_dir, overrides)
    return ppo.align(config, where, quiet_process(ranks, where), ranks)


def start(stage: str, ranks: Ranks, run_dir: str, overrides: list[str]) -> tuple[Any, Path]:
    """(config, run directory) of a stage whose front has just frozen the config."""
    composed = compose_stage(stage, overrides)
    assert not composed.problems + composed.unmet, composed.problems + composed.unmet
    where = Path(run_dir)
    if ranks.is_main:
        freeze(where, composed.values | {"run_dir": run_dir})
    barrier()
    torch.set_num_threads(1)
    return composed.config, where
