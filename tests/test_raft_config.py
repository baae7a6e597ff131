"""The numbers of raft: K, prompts and responses of an iteration, and the recipes that ship."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.config.compose import compose_stage
from rlhf_cli.config.tree import recipes
from rlhf_cli.schema import STAGES, PpoConfig, RaftConfig, build
from rlhf_cli.schema.raft import RankingConfig
from rlhf_cli.schema.stages import grad_accum_steps

SOURCE = "reward.sources=[{path: runs/rm}]"
REQUIRED = {"model": {"path": "m"}, "data": {"path": "p.jsonl"}}


def recipe(name: str, *words: str) -> RaftConfig:
    composed = compose_stage("raft", [f"conf={name}", "model.path=m", "data.path=p.jsonl", SOURCE, *words])
    assert composed.problems + composed.unmet == []
    assert isinstance(composed.config, RaftConfig)
    return composed.config


@pytest.mark.parametrize(
    ("options", "candidates", "prompts", "per_prompt", "samples", "rows"),
    [
        ({}, 8, 256, 8, 2048, 256),  # 1 / 0.125 = 8; 256 x 8 = 2048
        ({"strategy": "top"}, 8, 2048, 1, 2048, 256),
        ({"top_fraction": 0.333333, "batch_size": 10}, 3, 10, 3, 30, 10),
        ({"top_fraction": 0.333333, "batch_size": 10, "soft_temperature": 1.0}, 3, 10, 3, 30, 30),
        ({"top_fraction": 1, "strategy": "top"}, 1, 256, 1, 256, 256),
    ],
)
def test_what_an_iteration_needs(
    options: dict[str, Any], candidates: int, prompts: int, per_prompt: int, samples: int, rows: int
) -> None:
    ranking = build(RaftConfig, {"stage": "raft", "raft": options} | REQUIRED).raft
    assert isinstance(ranking, RankingConfig)
    assert (ranking.num_candidates, ranking.num_prompts, ranking.samples_per_prompt) == (
        candidates,
        prompts,
        per_prompt,
    )
    assert (ranking.num_samples, ranking.rows_per_iteration) == (samples, rows)
    assert ranking.num_prompts * ranking.samples_per_prompt == samples


def test_the_articles_numbers() -> None:
    config = recipe("hh_rlhf_llama_7b")
    ranking, sampling = config.raft, config.generation
    assert (ranking.batch_size, ranking.num_samples, ranking.num_candidates) == (1024, 8192, 8)
    assert (ranking.strategy, ranking.num_iterations, ranking.epochs) == ("local", 20, 4)
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_ratio) == (2e-5, "constant", 0)
    assert (sampling.min_new_tokens, sampling.max_new_tokens, sampling.temperature) == (126, 128, 0.85)
    assert (config.data.max_prompt_length, config.data.overlong, sampling.stop) == (256, "drop", ["###Human"])
    assert (config.lora.enabled, config.deepspeed.zero_stage, config.launch.num_processes) == (False, 3, 8)
    (rule,) = config.reward.rules
    assert (rule.pattern, rule.action) == ("#", "discard")


def test_a_rule_of_the_same_group_scores_in_ppo() -> None:
    composed = compose_stage("ppo", ["reward=hh", "model.path=m", "data.path=p.jsonl", SOURCE])
    assert isinstance(composed.config, PpoConfig)
    (rule,) = composed.config.reward.rules
    assert (rule.pattern, rule.action, rule.score) == ("#", "score", -1.0)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_small_twin_runs_on_any_number_of_ranks(ranks: int) -> None:
    train = recipe("hh_pairs").train
    assert grad_accum_steps(train.global_batch_size, train.micro_batch_size, ranks) == 8 // ranks  # 32 / 4 = 8


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes(STAGES["raft"])])
def test_every_recipe_can_hold_prompts_out_and_fill_its_steps(name: str) -> None:
    config = recipe(name)
    assert config.has_held_out, "or the result could not be the best policy"
    assert config.raft.rows_per_iteration % config.train.global_batch_size == 0
