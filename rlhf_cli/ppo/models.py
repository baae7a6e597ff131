"""The models of a PPO run: what align.models opens, a critic in an engine of its own, and the policy's average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from rlhf_cli.align import models as align
from rlhf_cli.align.models import Opener, Piece, check_positions, engine_piece, new_opener
from rlhf_cli.align.saving import LAST, MODEL, Written, raise_failures, save_classifier, save_policy
from rlhf_cli.assemble import Text
from rlhf_cli.errors import ModelError
from rlhf_cli.models.dropout import turn_off_dropout
from rlhf_cli.models.hydra import classifier_over
from rlhf_cli.models.lora import add_lora, load_adapter, plain_model
from rlhf_cli.models.packing import check_packing
from rlhf_cli.models.reward import enable_scores, load_reward_model, set_score_scale
from rlhf_cli.models.trainable import apply_trainable, matching_patterns, multiplied_parameters
from rlhf_cli.ppo.critic_origin import CriticOrigin, find_critic
from rlhf_cli.run import Run
from rlhf_cli.runtime.ema import Ema
from rlhf_cli.runtime.engine import Engine, sharded_loading
from rlhf_cli.runtime.flops import flops_per_token
from rlhf_cli.schema import PpoConfig

CRITIC, AVERAGE = "critic", "ema"  # directories in a checkpoint; the first also of the result


@dataclass
class Models(align.Models):
    """critic: shares the policy's tokenizer; critic_written: how it is saved."""

    config: PpoConfig
    critic: Engine | None
    critic_written: Written | None
    ema: Ema | None

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
        instead = self.ema.weights() if self.ema is not None and best is None else best
        results: dict[str, Mapping[str, torch.Tensor] | None] = {MODEL: None}
        if instead is not None:
            results = {LAST: None, MODEL: instead}
        failures = [save_policy(self.policy, self.written, run_dir, results)]
        if self.critic is not None:
            assert self.critic_written is not None
            failures.append(save_classifier(self.critic, self.critic_written, run_dir / CRITIC))
        raise_failures(failures)
        return self.written.output

    def pieces(self) -> dict[str, Piece]:
        """What a checkpoint holds of the models, by directory."""
        pieces = super().pieces()
        if self.critic is not None:
            pieces[CRITIC] = engine_piece(self.critic)
        if self.ema is not None:
            pieces[AVERAGE] = Piece(self.ema.export_state, self.ema.import_state, self.ema.num_bytes)
        return pieces


def open_models(config: PpoConfig, text: Text, run: Run, checkpoint: Path | None = None) -> Models:
    """Load and wrap everything. checkpoint: the directory that the caller is going to load `pieces` from.

    Raises ModelError for models that are missing, of the wrong kind, or do not fit each other.
    """
    opener = new_opener(config, text, run, checkpoint)
    origin = find_critic(config, text, opener.origins.policy)
    policy, policy_config = opener.policy()
    critic, critic_written = None, None
    if origin is not None:
        tree = _critic_tree(opener, config, origin)
        set_score_scale(plain_model(tree).config, origin.scale)
        critic_written = Written(turn_off_dropout(tree), text, origin.path, config.lora.enabled)
        critic = opener.engine(tree, CRITIC, config.ppo.critic_lr or config.optim.lr)
        opener.opened("critic", critic.module, origin.about)
    reference, rewards, held = opener.readers()
    check_positions(config, min(opener.positions))
    check_ptx(config, policy_config, opener.positions[0])
    ema = Ema(policy, config.ppo.ema) if config.ppo.ema is not None else None
    written = Written(policy_config, text, opener.origins.policy, config.lora.enabled)
    return Models(
        config, text, opener.dtype, policy, rewards, min(opener.positions), written, opener.read_params, reference,
        held, critic, critic_written, ema,
    )  # fmt: skip


def _critic_tree(opener: Opener, config: PpoConfig, origin: CriticOrigin) -> nn.Module:
    seed, text = config.train.seed, opener.text
    if config.ppo.sharing == "hydra":
        assert opener.bare is not None, "checked by the schema"
        base = classifier_over(opener.bare, None, seed)
    else:
        settings = replace(config.model, path=origin.path, revision=origin.revision)
        with sharded_loading(config.deepspeed, opener.dtype):
            base = load_reward_model(
                settings, origin.path, opener.dtype, None, seed, opener.run.ranks.device, len(text.tokenizer)
            )
    if origin.adapter is not None:
        return opener.ready(load_adapter(base, origin.adapter, trainable=True), enable_scores)
    if config.lora.enabled:
        return opener.ready(add_lora(base, config.lora, "SEQ_CLS", seed=seed), enable_scores)
    # The names of a causal LM's head are none of the critic's.
    trainable = replace(config.model.trainable, patterns=matching_patterns(base, config.model.trainable.patterns))
    apply_trainable(base, trainable, seed)
    return opener.ready(base, enable_scores)


def check_ptx(config: PpoConfig, policy: PretrainedConfig, positions: int) -> None:
    """Raise ModelError when the text beside the prompts (ppo.ptx) is longer than the policy has positions, or is to be
    packed and the policy would not keep its rows apart."""
    settings = config.ppo.ptx
    if settings.coef == 0:
        return
    if settings.data.packing:
        check_packing(policy, "ppo.ptx.data.packing")
    if settings.data.max_length > positions:
        raise ModelError(
            f"ppo.ptx.data.max_length: {settings.data.max_length} is more than the {positions} positions of the policy;"
            " lower it"
        )
