"""Checks of a typed config against the machine and its files, before any process starts. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cli.config.machine import check_machine
from rlhf_cli.config.merge_requests import check_merge
from rlhf_cli.config.paths import check_data_paths, check_model_path, check_tokenizer_path
from rlhf_cli.config.ppo_requests import check_ppo
from rlhf_cli.config.raft_requests import check_raft
from rlhf_cli.config.reward_requests import check_rewards
from rlhf_cli.errors import Problem
from rlhf_cli.schema import (
    MergeLoraConfig,
    PpoConfig,
    RaftConfig,
    RmConfig,
    ScoreConfig,
    StageConfig,
    TrainedConfig,
)
from rlhf_cli.schema.stages import grad_accum_steps


def check_request(config: StageConfig, world_size: int, has_gpu: bool, weights_needed: bool) -> Iterator[Problem]:
    """Everything that can be known to be wrong without torch: files, batch arithmetic, what a CPU cannot do.

    weights_needed: False for a dry run, which needs a model's config only.
    """
    match config:
        case TrainedConfig():
            yield from _check_training(config, world_size, has_gpu, weights_needed)
        case PpoConfig():
            yield from check_ppo(config, world_size, has_gpu, weights_needed)
        case RaftConfig():
            yield from check_raft(config, world_size, has_gpu, weights_needed)
        case MergeLoraConfig():
            yield from check_merge(config)
        case ScoreConfig():
            yield from check_data_paths("data.path", config.data.path)
            yield from check_rewards(config.reward)


def _check_training(config: TrainedConfig, world_size: int, has_gpu: bool, weights_needed: bool) -> Iterator[Problem]:
    steps = grad_accum_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    if isinstance(steps, Problem):
        yield steps
    yield from check_data_paths("data.path", config.data.path)
    yield from check_data_paths("data.eval_path", config.data.eval_path)
    if config.model.path:
        kinds = ("policy", "reward") if isinstance(config, RmConfig) else ("policy",)
        yield from check_model_path("model.path", config.model.path, kinds, weights_needed)
    if config.model.tokenizer.path:
        yield from check_tokenizer_path(config.model.tokenizer.path)
    yield from check_machine(config.model, config.logging, has_gpu or not weights_needed)
