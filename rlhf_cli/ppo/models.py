"""The models of a PPO run: policy and critic in engines, reference and reward models for reading.

separate: each has weights of its own (a LoRA policy's reference is its base without the adapter). hydra: one frozen
base that all of them share, see models.hydra.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf_cli.assemble import Text
from rlhf_cli.errors import ModelError, RunFailed
from rlhf_cli.models.dropout import turn_off_dropout
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.hydra import classifier_over, move_own, twin
from rlhf_cli.models.load import enable_gradient_checkpointing, load_policy, resolve_dtype
from rlhf_cli.models.lora import add_lora, load_adapter, plain_model
from rlhf_cli.models.reward import enable_scores, load_reward_model
from rlhf_cli.models.trainable import apply_trainable, count_parameters, matching_patterns, multiplied_parameters
from rlhf_cli.ppo.origins import CriticOrigin, Origins, find_origins
from rlhf_cli.ppo.reward_weights import RewardLoader
from rlhf_cli.ppo.saving import MODEL, Written, save_critic, save_policy
from rlhf_cli.reward.combine import Rewards, open_rewards
from rlhf_cli.run import Run
from rlhf_cli.runtime import engine_state
from rlhf_cli.runtime.distributed import gather_objects
from rlhf_cli.runtime.ema import Ema
from rlhf_cli.runtime.engine import Engine, make_engine, param_groups, sharded_loading
from rlhf_cli.runtime.flops import flops_per_token
from rlhf_cli.runtime.frozen import Borrowed, Frozen, Home, SharedWeights
from rlhf_cli.schema import LoadedModelConfig, PpoConfig

POLICY, CRITIC, AVERAGE = "policy", "critic", "ema"  # directories in a checkpoint


class Piece(NamedTuple):
    """A directory in a checkpoint: all ranks call write and read. num_bytes: over all ranks."""

    write: Callable[[Path], None]
    read: Callable[[Path], None]
    num_bytes: int


class SavedAs(NamedTuple):
    """What the trained models are written with. policy, critic: configs as they were before dropout was turned off."""

    origins: Origins
    policy: PretrainedConfig
    critic: PretrainedConfig | None


@dataclass
class Models:
    """text: the policy's tokenizer and template, which the critic and the reference share. positions: longest
    sequence that policy, critic and reference have positions for. read_params: of reference and reward models, those
    that a token is multiplied with."""

    config: PpoConfig
    text: Text
    dtype: torch.dtype
    policy: Engine
    critic: Engine | None
    rewards: Rewards
    ema: Ema | None
    positions: int
    saved_as: SavedAs
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

    def after_step(self) -> None:
        """To be called after each optimizer step of the policy."""
        if self.ema is not None:
            self.ema.update()

    def work(self, written: int, in_all: int) -> float:
        """FLOPs of an iteration with so many response tokens, prompts and responses together having in_all: to write
        them, to score them with every model, and ppo_epochs passes of training. See runtime.flops."""
        forward, training = float(self.read_params), 0.0
        for engine in (self.policy, self.critic):
            if engine is not None:
                counted = multiplied_parameters(engine.module)
                forward += counted.total
                training += flops_per_token(*counted)
        writing = 2.0 * multiplied_parameters(self.policy.module).total * in_all
        return writing + in_all * (2.0 * forward + self.config.ppo.ppo_epochs * training)

    def save(self, run_dir: Path, best: Mapping[str, torch.Tensor] | None = None) -> dict[str, str]:
        """Write the policy to model/, the critic to critic/; returns the manifest's `output`. All ranks call it.

        best: trained weights of the policy by name, of an earlier iteration, that are the result instead of the last
        ones ({} on other ranks than 0). Else with ppo.ema the result is the average. In both cases the last weights go
        to last_policy/.
        Raises RunFailed, on all ranks, when something cannot be written.
        """
        origins, is_adapter = self.saved_as.origins, self.config.lora.enabled
        average = self.ema.weights() if self.ema is not None and best is None else {}
        written = Written(self.saved_as.policy, self.text, origins.policy, is_adapter)
        failures = [save_policy(self.policy, written, run_dir, best or average)]
        if self.critic is not None:
            assert origins.critic is not None
            assert self.saved_as.critic is not None
            written = Written(self.saved_as.critic, self.text, origins.critic.path, is_adapter)
            failures.append(save_critic(self.critic, written, run_dir))
        for failure in (text for part in gather_objects(failures) for text in part):
            if failure is not None:
                raise RunFailed(failure)
        kind = ("adapter", "peft") if is_adapter else ("policy", "hf")
        return {"kind": kind[0], "task": "causal_lm", "path": MODEL, "format": kind[1]}

    def pieces(self) -> dict[str, Piece]:
        """What a checkpoint holds of the models, by directory."""
        pieces = {POLICY: _engine_piece(self.policy)}
        if self.critic is not None:
            pieces[CRITIC] = _engine_piece(self.critic)
        if self.ema is not None:
            pieces[AVERAGE] = Piece(self.ema.export_state, self.ema.import_state, self.ema.num_bytes)
        return pieces


def _engine_piece(engine: Engine) -> Piece:
    write, read = partial(engine_state.export_state, engine), partial(engine_state.import_state, engine)
    return Piece(write, read, engine_state.state_bytes(engine))


def open_models(config: PpoConfig, text: Text, run: Run, checkpoint: Path | None = None) -> Models:
    """Load and wrap everything. checkpoint: the directory that the caller is going to load `pieces` from.

    Raises ModelError for models that are missing, of the wrong kind, or do not fit each other.
    """
    dtype = resolve_dtype(config.model.dtype, run.ranks.device)
    opener = _Opener(config, text, run, dtype, find_origins(config, text), checkpoint)
    return opener.open()


@dataclass
class _Opener:
    """What all steps of opening look into."""

    config: PpoConfig
    text: Text
    run: Run
    dtype: torch.dtype
    origins: Origins
    checkpoint: Path | None
    read_params: int = 0

    def open(self) -> Models:
        model, bare = self._policy_tree()
        policy_config = turn_off_dropout(model)
        positions = [_positions(model)]
        policy = self._engine(model, POLICY, self.config.optim.lr)
        shared = None
        if bare is not None:
            shared = SharedWeights(bare.parameters())
            move_own(bare, shared.parameters, self.run.ranks.device)
        self._say_trained("policy", policy.module, str(self.config.model.path))
        critic, critic_config = None, None
        if self.origins.critic is not None:
            tree = self._critic_tree(self.origins.critic, bare)
            critic_config = turn_off_dropout(tree)
            positions.append(_positions(tree))
            critic = self._engine(tree, CRITIC, self.config.ppo.critic_lr or self.config.optim.lr)
            self._say_trained("critic", critic.module, self.origins.critic.about)
        reference = self._reference(bare, shared)
        positions.append(_positions(reference.module))
        home = frozen_home(self.config, None, self.run.ranks.world_size)
        load = RewardLoader(self.config, self.text, self.run, self.origins.policy, home, bare, shared)
        rewards = open_rewards(self.config.reward, self.run.ranks.device, load)
        for name, about in rewards.about.items():
            self.run.say(f"{name}: {about}")
        check_positions(self.config, min(positions), positions[0])
        ema = Ema(policy, self.config.ppo.ema) if self.config.ppo.ema is not None else None
        saved_as = SavedAs(self.origins, policy_config, critic_config)
        read = self.read_params + load.params
        return Models(
            self.config, self.text, self.dtype, policy, critic, rewards, ema, min(positions), saved_as, read,
            reference, load.held,
        )  # fmt: skip

    # --- what is trained

    def _policy_tree(self) -> tuple[nn.Module, PreTrainedModel | None]:
        """The policy; and with LoRA a tree of the same weights without the adapter."""
        config = self.config
        with sharded_loading(config.deepspeed, self.dtype):
            base = load_policy(
                config.model, self.origins.policy, self.dtype, self.run.ranks.device, len(self.text.tokenizer)
            )
        if not config.lora.enabled:
            apply_trainable(base, config.model.trainable, config.train.seed)
            return self._ready(base, enable_loss), None
        bare = twin(base)
        return self._ready(add_lora(base, config.lora, "CAUSAL_LM", seed=config.train.seed), enable_loss), bare

    def _critic_tree(self, origin: CriticOrigin, bare: PreTrainedModel | None) -> nn.Module:
        config, seed = self.config, self.config.train.seed
        if config.ppo.sharing == "hydra":
            assert bare is not None, "checked by the schema"
            base = classifier_over(bare, None, seed)
        else:
            settings = replace(config.model, path=origin.path, revision=origin.revision)
            with sharded_loading(config.deepspeed, self.dtype):
                base = load_reward_model(
                    settings, origin.path, self.dtype, None, seed, self.run.ranks.device, len(self.text.tokenizer)
                )
        if origin.adapter is not None:
            return self._ready(load_adapter(base, origin.adapter, trainable=True), enable_scores)
        if config.lora.enabled:
            return self._ready(add_lora(base, config.lora, "SEQ_CLS", seed=seed), enable_scores)
        # The names of a causal LM's head are none of the critic's.
        trainable = replace(config.model.trainable, patterns=matching_patterns(base, config.model.trainable.patterns))
        apply_trainable(base, trainable, seed)
        return self._ready(base, enable_scores)

    def _ready(self, model: nn.Module, enable: Callable[[nn.Module], object]) -> nn.Module:
        if self.config.model.gradient_checkpointing:
            enable_gradient_checkpointing(plain_model(model))
        enable(model)
        return model

    def _engine(self, model: nn.Module, name: str, lr: float) -> Engine:
        config = self.config
        steps = None if self.checkpoint is None else engine_state.saved_steps(self.checkpoint / name)
        groups = param_groups(model, config.optim.weight_decay, steps)
        engine = make_engine(model, groups, replace(config.optim, lr=lr), config.deepspeed, self.dtype, self.run.ranks)
        engine.train()  # gradient checkpointing works in training mode only; dropout is off
        return engine

    def _say_trained(self, name: str, model: nn.Module, about: str) -> None:
        trainable, total = count_parameters(model)
        share = f"{trainable:,} of {total:,} parameters are trained, {str(self.dtype).removeprefix('torch.')}"
        self.run.say(f"{name}: {about}; {share}")

    # --- what is read

    def _reference(self, bare: PreTrainedModel | None, shared: SharedWeights | None) -> Frozen | Borrowed:
        path, settings = self.origins.reference, self.config.model
        if path is None:
            assert bare is not None
            assert shared is not None
            enable_loss(bare)
            self.read_params += multiplied_parameters(bare).total
            self.run.say("reference: the policy's base, without the adapter")
            return Borrowed(bare, shared)
        if self.config.ppo.ref is not None:
            settings = replace(settings, path=path, revision=None)
        model = load_policy(settings, path, self.dtype, self.run.ranks.device, len(self.text.tokenizer))
        enable_loss(model)
        self.read_params += multiplied_parameters(model).total
        home = frozen_home(self.config, settings, self.run.ranks.world_size)
        self.run.say(f"reference: {path}, {_at_rest(home)}")
        return Frozen(model, home, self.run.ranks)


def frozen_home(config: PpoConfig, settings: LoadedModelConfig | None, world_size: int) -> Home:
    """Where weights are that are only read: ppo.frozen, with auto resolved. settings: of a model
    other than a reward source."""
    if settings is not None and settings.quantization == "nf4":
        return "keep"  # its pieces are of no use one by one, and it is small
    if config.ppo.frozen == "auto":
        return "shard" if config.deepspeed.zero_stage == 3 and world_size > 1 else "keep"
    return config.ppo.frozen


def check_positions(config: PpoConfig, positions: int, of_policy: int) -> None:
    """Raise ModelError when prompt and response are longer than the models have positions, or the text beside them
    (ppo.ptx) than the policy has."""
    longest = config.data.max_prompt_length + config.generation.max_new_tokens
    if longest > positions:
        raise ModelError(
            f"data.max_prompt_length + generation.max_new_tokens: {config.data.max_prompt_length} +"
            f" {config.generation.max_new_tokens} = {longest} is more than the {positions} positions of the models;"
            " lower one of them"
        )
    text = config.ppo.ptx
    if text.coef > 0 and text.data.max_length > of_policy:
        raise ModelError(
            f"ppo.ptx.data.max_length: {text.data.max_length} is more than the {of_policy} positions of the policy;"
            " lower it"
        )


def _positions(model: nn.Module) -> int:
    config = plain_model(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _at_rest(home: Home) -> str:
    return {
        "keep": "whole on every device",
        "shard": "sharded over the ranks between uses",
        "offload": "in the machine's memory between uses",
    }[home]
