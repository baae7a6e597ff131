"""The RLHF pipeline as one command line: sft, rm, merge-lora, ppo, raft."""

__version__ = "0.1.0"
