"""The models of a run that aligns a policy: the policy in an engine, reference and reward models for reading.

separate: each has weights of its own (a LoRA policy's reference is its base without the adapter). hydra: one frozen
base that all of them share, see models.hydra.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.align.origins import Origins, find_origins
from rlhf_cli.align.reward_weights import RewardLoader
from rlhf_cli.align.saving import Written
from rlhf_cli.assemble import Text
from rlhf_cli.errors import ModelError
from rlhf_cli.models.dropout import turn_off_dropout
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.hydra import move_own, twin
from rlhf_cli.models.load import enable_gradient_checkpointing, load_policy, resolve_dtype
from rlhf_cli.models.lora import add_lora, plain_model
from rlhf_cli.models.trainable import apply_trainable, count_parameters, multiplied_parameters
from rlhf_cli.reward.combine import Rewards, open_rewards
from rlhf_cli.run import Run
from rlhf_cli.runtime import engine_state
from rlhf_cli.runtime.engine import Engine, make_engine, param_groups, sharded_loading
from rlhf_cli.runtime.frozen import Borrowed, Frozen, Home, SharedWeights
from rlhf_cli.schema import AlignedConfig, LoadedModelConfig

POLICY = "policy"  # its directory in a checkpoint


class Piece(NamedTuple):
    """A directory in a checkpoint: all ranks call write and read. num_bytes: over all ranks."""

    write: Callable[[Path], None]
    read: Callable[[Path], None]
    num_bytes: int


@dataclass
class Models:
    """text: the policy's tokenizer and template, which the reference shares. positions: longest sequence that the
    models have positions for. written: how the policy is saved. read_params: of reference and reward models, those that
    a token is multiplied with."""

    config: AlignedConfig
    text: Text
    dtype: torch.dtype
    policy: Engine
    rewards: Rewards
    positions: int
    written: Written
    read_params: int
    held_reference: Frozen | Borrowed
    held_rewards: list[Frozen | Borrowed]

    @property
    def vocab_size(self) -> int:
        """Rows of the policy's embeddings, which may be more than the tokenizer has tokens."""
        return int(plain_model(self.policy.module).config.get_text_config().vocab_size)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference with whole weights, to be called as forward.response_logprobs does. All ranks enter and leave;
        inside, the engines must not be called."""
        with self.held_reference.whole() as module:
            yield module

    @contextmanager
    def scoring(self) -> Iterator[Rewards]:
        """The reward sources with whole weights. All ranks enter and leave; inside, the engines must not be called."""
        with ExitStack() as stack:
            for held in self.held_rewards:
                stack.enter_context(held.whole())
            yield self.rewards

    def pieces(self) -> dict[str, Piece]:
        """What a checkpoint holds of the models, by directory."""
        return {POLICY: engine_piece(self.policy)}


def engine_piece(engine: Engine) -> Piece:
    """An engine's part of a checkpoint."""
    write, read = partial(engine_state.export_state, engine), partial(engine_state.import_state, engine)
    return Piece(write, read, engine_state.state_bytes(engine))


@dataclass
class Opener:
    """Loads and wraps models, the policy first. checkpoint: the directory that the caller is going to load
    Models.pieces from; bare, shared: with LoRA the policy's base without the adapter, and its weights."""

    config: AlignedConfig
    text: Text
    run: Run
    checkpoint: Path | None
    dtype: torch.dtype
    origins: Origins
    positions: list[int] = field(default_factory=list)
    read_params: int = 0
    bare: PreTrainedModel | None = None
    shared: SharedWeights | None = None

    def policy(self) -> tuple[Engine, PretrainedConfig]:
        """The policy, and its config as it was before dropout was turned off."""
        config = self.config
        with sharded_loading(config.deepspeed, self.dtype):
            base = load_policy(
                config.model, self.origins.policy, self.dtype, self.run.ranks.device, len(self.text.tokenizer)
            )
        if config.lora.enabled:
            self.bare = twin(base)
            model = self.ready(add_lora(base, config.lora, "CAUSAL_LM", seed=config.train.seed), enable_loss)
        else:
            apply_trainable(base, config.model.trainable, config.train.seed)
            model = self.ready(base, enable_loss)
        saved_config = turn_off_dropout(model)
        engine = self.engine(model, POLICY, config.optim.lr)
        if self.bare is not None:
            self.shared = SharedWeights(self.bare.parameters())
            move_own(self.bare, self.shared.parameters, self.run.ranks.device)
        self.opened("policy", engine.module, str(config.model.path))
        return engine, saved_config

    def readers(self) -> tuple[Frozen | Borrowed, Rewards, list[Frozen | Borrowed]]:
        """Reference and rewards, and what holds the latter's weights."""
        reference = self._reference()
        self.positions.append(num_positions(reference.module))
        home = frozen_home(self.config, None, self.run.ranks.world_size)
        load = RewardLoader(self.config, self.text, self.run, self.origins.policy, home, self.bare, self.shared)
        rewards = open_rewards(self.config.reward, self.run.ranks.device, load)
        for name, about in rewards.about.items():
            self.run.say(f"{name}: {about}")
        self.read_params += load.params
        return reference, rewards, load.held

    def ready(self, model: nn.Module, enable: Callable[[nn.Module], object]) -> nn.Module:
        """With gradient checkpointing if asked, and what `enable` adds to it."""
        if self.config.model.gradient_checkpointing:
            enable_gradient_checkpointing(plain_model(model))
        enable(model)
        return model

    def engine(self, model: nn.Module, name: str, lr: float) -> Engine:
        """name: its directory in a checkpoint."""
        config = self.config
        steps = None if self.checkpoint is None else engine_state.saved_steps(self.checkpoint / name)
        groups = param_groups(model, config.optim.weight_decay, steps)
        engine = make_engine(model, groups, replace(config.optim, lr=lr), config.deepspeed, self.dtype, self.run.ranks)
        engine.train()  # gradient checkpointing works in training mode only; dropout is off
        return engine

    def opened(self, name: str, model: nn.Module, about: str) -> None:
        """Tell the user of a trained model, and note its positions."""
        self.positions.append(num_positions(model))
        trainable, total = count_parameters(model)
        share = f"{trainable:,} of {total:,} parameters are trained, {str(self.dtype).removeprefix('torch.')}"
        self.run.say(f"{name}: {about}; {share}")

    def _reference(self) -> Frozen | Borrowed:
        path, settings = self.origins.reference, self.config.model
        if path is None:
            assert self.bare is not None
            assert self.shared is not None
            enable_loss(self.bare)
            self.read_params += multiplied_parameters(self.bare).total
            self.run.say("reference: the policy's base, without the adapter")
            return Borrowed(self.bare, self.shared)
        if self.config.algorithm.ref is not None:
            settings = replace(settings, path=path, revision=None)
        model = load_policy(settings, path, self.dtype, self.run.ranks.device, len(self.text.tokenizer))
        enable_loss(model)
        self.read_params += multiplied_parameters(model).total
        home = frozen_home(self.config, settings, self.run.ranks.world_size)
        self.run.say(f"reference: {path}, {_at_rest(home)}")
        return Frozen(model, home, self.run.ranks)


def new_opener(config: AlignedConfig, text: Text, run: Run, checkpoint: Path | None) -> Opener:
    """Raises ModelError for a policy or reference that is missing or of the wrong kind, and for a reference that has
    another tokenizer or template."""
    dtype = resolve_dtype(config.model.dtype, run.ranks.device)
    return Opener(config, text, run, checkpoint, dtype, find_origins(config, text))


def frozen_home(config: AlignedConfig, settings: LoadedModelConfig | None, world_size: int) -> Home:
    """Where weights are that are only read: ppo.frozen or raft.frozen, with auto resolved. settings: of a model other
    than a reward source."""
    if settings is not None and settings.quantization == "nf4":
        return "keep"  # its pieces are of no use one by one, and it is small
    if config.algorithm.frozen == "auto":
        return "shard" if config.deepspeed.zero_stage == 3 and world_size > 1 else "keep"
    return config.algorithm.frozen


def check_positions(config: AlignedConfig, positions: int) -> None:
    """Raise ModelError when prompt and response are longer than the models have positions."""
    longest = config.data.max_prompt_length + config.generation.max_new_tokens
    if longest > positions:
        raise ModelError(
            f"data.max_prompt_length + generation.max_new_tokens: {config.data.max_prompt_length} +"
            f" {config.generation.max_new_tokens} = {longest} is more than the {positions} positions of the models;"
            " lower one of them"
        )


def num_positions(model: nn.Module) -> int:
    """Longest sequence that a model has positions for."""
    config = plain_model(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _at_rest(home: Home) -> str:
    return {
        "keep": "whole on every device",
        "shard": "sharded over the ranks between uses",
        "offload": "in the machine's memory between uses",
    }[home]
