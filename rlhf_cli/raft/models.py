"""The models of a RAFT run: what align.models opens, and how the results are saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlhf_cli.align import models as align
from rlhf_cli.align.models import check_positions, new_opener
from rlhf_cli.align.saving import BEST, LAST, MODEL, Written, raise_failures, save_policy
from rlhf_cli.assemble import Text
from rlhf_cli.models.trainable import multiplied_parameters
from rlhf_cli.run import Run
from rlhf_cli.runtime.flops import flops_per_token
from rlhf_cli.schema import RaftConfig

ITERATIONS = "models"  # where raft.keep_models keeps them


@dataclass
class Models(align.Models):
    """The policy, its reference and the rewards."""

    config: RaftConfig

    def work(self, in_all: int, trained: int) -> float:
        """FLOPs of an iteration. in_all: tokens of responses with their prompts, which the reward models read, too;
        trained: of all passes of the fine-tuning. See runtime.flops."""
        counted = multiplied_parameters(self.policy.module)
        writing = 2.0 * counted.total * in_all
        return writing + 2.0 * self.read_params * in_all + trained * flops_per_token(*counted)

    def save(self, run_dir: Path, best: Mapping[str, Tensor] | None, hands_over_best: bool) -> dict[str, str]:
        """Write the result to model/; returns the manifest's `output`. All ranks call it.

        best: trained weights by name of another iteration than the last, if that was better ({} on other ranks than 0).
        hands_over_best: it is model/, and the last policy goes to last_policy/; else it goes to best_policy/.
        Raises RunFailed, on all ranks, when something cannot be written.
        """
        results: dict[str, Mapping[str, Tensor] | None] = {MODEL: None}
        if best is not None:
            results = {LAST: None, MODEL: best} if hands_over_best else {MODEL: None, BEST: best}
        raise_failures([save_policy(self.policy, self.written, run_dir, results)])
        return self.written.output

    def save_iteration(self, run_dir: Path, iteration: int) -> None:
        """Keep the policy as it is after so many iterations. All ranks call it; raises RunFailed on all of them."""
        name = f"{ITERATIONS}/iteration_{iteration:02d}"
        raise_failures([save_policy(self.policy, self.written, run_dir, {name: None})])


def open_models(config: RaftConfig, text: Text, run: Run, checkpoint: Path | None = None) -> Models:
    """Load and wrap everything. checkpoint: the directory that the caller is going to load `pieces` from.

    Raises ModelError for models that are missing, of the wrong kind, or do not fit each other.
    """
    opener = new_opener(config, text, run, checkpoint)
    policy, policy_config = opener.policy()
    reference, rewards, held = opener.readers()
    check_positions(config, min(opener.positions))
    written = Written(policy_config, text, opener.origins.policy, config.lora.enabled)
    return Models(
        config, text, opener.dtype, policy, rewards, min(opener.positions), written, opener.read_params, reference, held
    )
