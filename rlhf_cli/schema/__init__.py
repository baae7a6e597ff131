"""What a config may say: one dataclass per section, with defaults, meanings, allowed values and checks."""

from rlhf_cli.schema.build import build, flatten, from_file, known_keys, suggest, to_dict
from rlhf_cli.schema.sections import (
    ArchConfig,
    DataConfig,
    DeepspeedConfig,
    EarlyStoppingConfig,
    FilterConfig,
    GenerationConfig,
    LaunchConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    TokenizerConfig,
    TrainableConfig,
    TrainConfig,
)
from rlhf_cli.schema.stages import STAGES, SftConfig, StageInfo

__all__ = [
    "STAGES",
    "ArchConfig",
    "DataConfig",
    "DeepspeedConfig",
    "EarlyStoppingConfig",
    "FilterConfig",
    "GenerationConfig",
    "LaunchConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "SftConfig",
    "StageInfo",
    "TokenizerConfig",
    "TrainConfig",
    "TrainableConfig",
    "build",
    "flatten",
    "from_file",
    "known_keys",
    "suggest",
    "to_dict",
]
