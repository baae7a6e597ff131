"""Reward sources: models, functions, references, servers; see `open_reward` for use from Python."""

from rlhf_cli.reward.scorer import Scorer, open_reward

__all__ = ["Scorer", "open_reward"]
