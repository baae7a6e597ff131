"""What a config may say: one dataclass per section, with defaults, meanings, allowed values and checks."""

from rlhf_cli.schema.build import build, flatten, from_file, known_keys, suggest, to_dict
from rlhf_cli.schema.data import ComparisonDataConfig, DataConfig, FilterConfig, SourceConfig, TrainingSourceConfig
from rlhf_cli.schema.job import DeepspeedConfig, LaunchConfig, LoggingConfig, ProgressConfig
from rlhf_cli.schema.model import ArchConfig, LoraConfig, MergeConfig, ModelConfig, TokenizerConfig, TrainableConfig
from rlhf_cli.schema.reward import RewardConfig, RewardSourceConfig
from rlhf_cli.schema.stages import (
    STAGES,
    MergeLoraConfig,
    RmConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
    StageInfo,
    TrainedConfig,
)
from rlhf_cli.schema.training import ComparisonConfig, EarlyStoppingConfig, GenerationConfig, OptimConfig, TrainConfig

__all__ = [
    "STAGES",
    "ArchConfig",
    "ComparisonConfig",
    "ComparisonDataConfig",
    "DataConfig",
    "DeepspeedConfig",
    "EarlyStoppingConfig",
    "FilterConfig",
    "GenerationConfig",
    "LaunchConfig",
    "LoggingConfig",
    "LoraConfig",
    "MergeConfig",
    "MergeLoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ProgressConfig",
    "RewardConfig",
    "RewardSourceConfig",
    "RmConfig",
    "ScoreConfig",
    "SftConfig",
    "SourceConfig",
    "StageConfig",
    "StageInfo",
    "TokenizerConfig",
    "TrainConfig",
    "TrainableConfig",
    "TrainedConfig",
    "TrainingSourceConfig",
    "build",
    "flatten",
    "from_file",
    "known_keys",
    "suggest",
    "to_dict",
]
