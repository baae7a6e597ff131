"""Reward models of an aligning run: over the policy's frozen base (sharing: hydra), or with weights of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.align.origins import check_base, other_text
from rlhf_cli.assemble import Text
from rlhf_cli.errors import ModelError
from rlhf_cli.files import digest_tree
from rlhf_cli.models.hydra import classifier_over, move_own
from rlhf_cli.models.lora import load_adapter
from rlhf_cli.models.trainable import multiplied_parameters
from rlhf_cli.reward.open_model import Checked, load_classifier
from rlhf_cli.run import Run
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.distributed import broadcast_object
from rlhf_cli.runtime.frozen import Borrowed, Frozen, Home, SharedWeights
from rlhf_cli.schema import AlignedConfig, RewardSourceConfig


@dataclass
class RewardLoader:
    """Makes each model source's model (reward.open_model.Load) and keeps hold of its weights.

    policy: directory or hub id of the base; home: of weights that are not shared; bare, shared: the base without
    adapters, and its weights. held: what is to be whole while rewards are computed; params: of all models, those that
    a token is multiplied with.
    """

    config: AlignedConfig
    text: Text
    run: Run
    policy: str
    home: Home
    bare: PreTrainedModel | None
    shared: SharedWeights | None
    held: list[Frozen | Borrowed] = field(default_factory=list)
    params: int = 0

    def __call__(self, source: RewardSourceConfig, checked: Checked, device: torch.device) -> nn.Module:
        """Raises ModelError for an adapter that does not fit the shared base."""
        hydra = self.config.algorithm.sharing == "hydra"
        if hydra and checked.found.base is not None:
            model = self._over_base(source, checked, device)
            assert self.shared is not None
            self.held.append(Borrowed(model, self.shared))
            self.params += multiplied_parameters(model).total
            return model
        if hydra:
            self.run.say(f"{source.path}: has weights of its own, beside the base that the others share")
        model = load_classifier(source, checked, device)
        self.params += multiplied_parameters(model).total
        self.held.append(Frozen(model, self.home, self.run.ranks))
        return model

    def _over_base(self, source: RewardSourceConfig, checked: Checked, device: torch.device) -> nn.Module:
        assert self.bare is not None
        assert self.shared is not None
        self._check(source, checked)
        tree = load_adapter(classifier_over(self.bare, checked.labels or None, 0), checked.found.path)
        move_own(tree, self.shared.parameters, device)
        return tree.requires_grad_(False)  # the shared weights are frozen already

    def _check(self, source: RewardSourceConfig, checked: Checked) -> None:
        key = next(f"reward.sources[{i}]" for i, s in enumerate(self.config.reward.sources) if s is source)
        check_base(checked.found, key, self.config.stage, self.policy, self._policy_digest)
        if source.dtype not in ("auto", self.config.model.dtype):
            raise ModelError(
                f"{key}.dtype: {source.dtype}, but with {self.config.stage}.sharing=hydra the reward model uses the"
                f" policy's weights (model.dtype={self.config.model.dtype}); leave it at auto"
            )
        differs = other_text(self.text, checked.found.path, source.revision, source.trust_remote_code)
        if differs:
            stage = self.config.stage
            raise ModelError(
                f"{key}.path: {source.path} {differs}; with {stage}.sharing=hydra it reads the same tokens"
            )

    @cached_property
    def _policy_digest(self) -> str | None:
        """Once for all ranks and sources: it may take a minute."""
        if not Path(self.policy).is_dir():
            return None
        mine = None
        if self.run.ranks.is_main:
            mine = read_manifest(self.run.run_dir).get("base_digest") or digest_tree(Path(self.policy))
        return broadcast_object(mine)
