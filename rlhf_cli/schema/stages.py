"""One dataclass per stage: its sections, and the checks that span several of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf_cli.errors import Problem
from rlhf_cli.schema.data import (
    ComparisonDataConfig,
    DataConfig,
    PromptDataConfig,
    SourceConfig,
    TrainingSourceConfig,
)
from rlhf_cli.schema.fields import opt, section, unread
from rlhf_cli.schema.generation import GenerationConfig, RolloutConfig
from rlhf_cli.schema.job import DeepspeedConfig, LaunchConfig, LoggingConfig, ProgressConfig
from rlhf_cli.schema.model import LoadedModelConfig, LoraConfig, MergeConfig, ModelConfig
from rlhf_cli.schema.raft import RaftEvalConfig, RaftTrainConfig, RankingConfig, RankingRewardConfig
from rlhf_cli.schema.reward import PolicyRewardConfig, RewardConfig
from rlhf_cli.schema.rl import AlgorithmConfig, AlignmentConfig, EvalConfig, RlLoggingConfig, RlTrainConfig
from rlhf_cli.schema.training import ComparisonConfig, OptimConfig, TrainConfig


@dataclass
class StageConfig:
    """What every stage has."""

    stage: str = opt("", "the stage this config is for")
    run_dir: str | None = opt(None, "where the run writes; null = runs/<stage>/<recipe>-<UTC time>")
    resume: Literal["auto", "never"] = opt(
        "auto", "auto: leave a finished run alone, continue an unfinished one; never: refuse a directory with a run"
    )


@dataclass
class ModelledConfig(StageConfig):
    """What a stage has that trains a model."""

    model: LoadedModelConfig = section(LoadedModelConfig, "the model to start from")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    optim: OptimConfig = section(OptimConfig, "AdamW and its schedule")
    deepspeed: DeepspeedConfig = section(DeepspeedConfig, "how the training is spread over the ranks")
    launch: LaunchConfig = section(LaunchConfig, "how the ranks are started")
    logging: LoggingConfig = section(LoggingConfig, "where progress is shown")

    def check(self) -> Iterator[Problem]:
        yield from check_adapters(self.model, self.lora, self.deepspeed)


@dataclass
class TrainedConfig(ModelledConfig):
    """What a stage has that trains by the supervised loop."""

    model: ModelConfig = section(ModelConfig, "the model to start from")
    data: TrainingSourceConfig = section(TrainingSourceConfig, "what is read and how it becomes tokens")
    train: TrainConfig = section(TrainConfig, "length and rhythm of the training")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.lora.enabled and self.model.init == "scratch":
            yield Problem("lora.enabled", "an adapter on random weights learns nothing; drop it or model.init=scratch")
        if self.train.early_stopping.patience and not has_eval(self.data):
            yield Problem(
                "train.early_stopping.patience",
                "needs evaluation data: set data.validation_split_percentage or data.eval_path",
            )


@dataclass
class SftConfig(TrainedConfig):
    """Supervised fine-tuning of a causal language model, or pre-training from scratch."""

    stage: Literal["sft"] = opt("sft", "the stage this config is for")
    data: DataConfig = section(DataConfig, "what is read and how it becomes tokens")
    generation: GenerationConfig = section(GenerationConfig, "sample texts at each evaluation")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.data.format in ("prompts", "labelled") and not self.data.row_format:
            yield Problem(
                "data.format",
                f"{self.data.format} has no text to train on; set data.row_format,"
                " or use text_only, text2text, conversation, paired, ranked or hh",
            )


@dataclass
class RmConfig(TrainedConfig):
    """Reward model from pairs, rankings or labelled texts."""

    stage: Literal["rm"] = opt("rm", "the stage this config is for")
    model: ModelConfig = section(ModelConfig, "the model to start from; it gets a new head for the score")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters; the head is trained in full beside them")
    data: ComparisonDataConfig = section(ComparisonDataConfig, "pairs, rankings or labelled texts")
    rm: ComparisonConfig = section(ComparisonConfig, "what is learnt from them, and what is said of the scores")


@dataclass
class AlignedConfig(ModelledConfig):
    """What ppo and raft have alike: a policy writes responses, which are scored and learnt from."""

    model: LoadedModelConfig = section(LoadedModelConfig, "the policy to start from")
    data: PromptDataConfig = section(PromptDataConfig, "prompts that the policy answers")
    generation: RolloutConfig = section(RolloutConfig, "how it answers")
    reward: PolicyRewardConfig = section(PolicyRewardConfig, "what scores the answers")
    train: RlTrainConfig = section(RlTrainConfig, "rhythm of the training")
    eval: EvalConfig = section(EvalConfig, "what is measured beside")
    logging: RlLoggingConfig = section(RlLoggingConfig, "where progress and samples are shown")

    @property
    def algorithm(self) -> AlignmentConfig:
        """The section that has the stage's name."""
        raise NotImplementedError

    @property
    def has_held_out(self) -> bool:
        """Whether there are prompts to evaluate on."""
        return bool(self.data.eval_path or self.data.validation_split_percentage)

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.model.trainable.mode == "lisa":
            yield Problem("model.trainable.mode", "lisa is for supervised stages; use all, last_layers or patterns")
        if self.lora.dropout:
            yield Problem("lora.dropout", "must be 0: a policy writes and learns without dropout")
        if self.generation.temperature == 0:
            yield Problem("generation.temperature", "must be > 0: the likeliest token teaches nothing")
        yield from self._check_evaluation()
        if self.algorithm.alarms.action == "stop" and not (self.has_held_out and self.train.eval_every):
            yield Problem(
                f"{self.stage}.alarms.action",
                "stop hands over the best policy so far: set train.eval_every, and hold prompts out"
                " (data.validation_split_percentage or data.eval_path)",
            )
        if self.algorithm.sharing == "hydra":
            yield from self._check_sharing()

    def _check_evaluation(self) -> Iterator[Problem]:
        hold_out = "data.validation_split_percentage or data.eval_path"
        if not self.has_held_out:
            yield from unread(self.eval, ("num_prompts", "temperature"), hold_out, "eval.")
        if self.eval.tax_path is None:
            yield from unread(self.eval, ("tax_rows",), "eval.tax_path", "eval.")
        if not self.has_held_out and self.eval.tax_path is None:
            yield from unread(self.train, ("eval_every",), f"{hold_out}, or eval.tax_path,", "train.")

    def _check_sharing(self) -> Iterator[Problem]:
        key = f"{self.stage}.sharing"
        if not self.lora.enabled:
            yield Problem(key, "hydra trains adapters on one frozen base; set lora.enabled=true (lora=r16)")
        if self.algorithm.ref is not None:
            yield Problem(f"{self.stage}.ref", f"with {key}=hydra the reference is the base itself; drop it")
        if self.model.quantization != "none":
            yield Problem(key, "hydra does not share nf4 weights; use separate or model.quantization=none")


@dataclass
class PpoConfig(AlignedConfig):
    """Proximal policy optimisation against reward sources."""

    stage: Literal["ppo"] = opt("ppo", "the stage this config is for")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters, of policy and critic")
    ppo: AlgorithmConfig = section(AlgorithmConfig, "how the policy learns from the scores")

    @property
    def algorithm(self) -> AlgorithmConfig:
        return self.ppo

    def _check_sharing(self) -> Iterator[Problem]:
        yield from super()._check_sharing()
        if self.ppo.critic not in ("auto", "reward", "policy"):
            yield Problem("ppo.critic", "with ppo.sharing=hydra: auto, reward or policy")


@dataclass
class RaftConfig(AlignedConfig):
    """Reward-ranked fine-tuning: the policy learns from the best of what it writes."""

    stage: Literal["raft"] = opt("raft", "the stage this config is for")
    reward: RankingRewardConfig = section(
        RankingRewardConfig, "what the answers are ranked by; without sources, the policy's own mean token log-prob"
    )
    raft: RankingConfig = section(RankingConfig, "what is selected, and how the policy learns from it")
    train: RaftTrainConfig = section(RaftTrainConfig, "the fine-tuning of an iteration, rhythm")
    eval: RaftEvalConfig = section(RaftEvalConfig, "what is measured beside")

    @property
    def algorithm(self) -> RankingConfig:
        return self.raft

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if not (self.has_held_out and self.reward.sources):
            reader = "reward.sources, and data.validation_split_percentage or data.eval_path,"
            yield from unread(self.raft, ("result",), reader, "raft.")
        if self.raft.alarms.action == "stop" and not self.reward.sources:
            yield Problem(
                "raft.alarms.action",
                "stop hands over the best policy so far, and without reward.sources none is best; use warn",
            )


@dataclass
class MergeLoraConfig(StageConfig):
    """Adapter + base -> plain model."""

    stage: Literal["merge-lora"] = opt("merge-lora", "the stage this config is for")
    merge: MergeConfig = section(MergeConfig, "what is merged, and how it is written")
    logging: ProgressConfig = section(ProgressConfig, "where progress is shown")


@dataclass
class ScoreSummaryConfig:
    """What is said of the scores."""

    pass_at_k: list[int] = opt(
        [], "pass@k for these k: rows with the same prompt are samples of one task (arXiv 2107.03374)", ge=1
    )
    passes_above: float = opt(0.5, "pass_at_k: a response is correct when its score is above; tests give 1 or 0")

    def check(self) -> Iterator[Problem]:
        if not self.pass_at_k:
            yield from unread(self, ("passes_above",), "score.pass_at_k")


@dataclass
class ScoreConfig(StageConfig):
    """Rewards of responses or pairs, row by row."""

    stage: Literal["score"] = opt("score", "the stage this config is for")
    data: SourceConfig = section(SourceConfig, "responses, pairs, rankings or texts")
    reward: RewardConfig = section(RewardConfig, "what scores them")
    score: ScoreSummaryConfig = section(ScoreSummaryConfig, "what is said of the scores")
    launch: LaunchConfig = section(LaunchConfig, "how the ranks are started, which share the rows")
    logging: ProgressConfig = section(ProgressConfig, "where progress is shown")

    def check(self) -> Iterator[Problem]:
        if self.data.format == "prompts":
            yield Problem("data.format", "prompts has no response to score; use text2text, paired, ranked or text_only")


def has_eval(data: TrainingSourceConfig) -> bool:
    """Whether there is anything to evaluate on."""
    return bool(data.eval_path) or data.validation_split_percentage > 0


def responses_accumulation(config: PpoConfig, world_size: int) -> int | Problem:
    """rollout_batch_size / num_mini_batches / (micro_batch_size x world size), exact, or the problem with it."""
    mini_batch = config.ppo.rollout_batch_size // config.ppo.num_mini_batches
    per_forward = config.train.micro_batch_size * world_size
    if mini_batch % per_forward:
        return Problem(
            "ppo.rollout_batch_size",
            f"{config.ppo.rollout_batch_size} / num_mini_batches {config.ppo.num_mini_batches} = {mini_batch} is not a"
            f" multiple of train.micro_batch_size x number of ranks = {config.train.micro_batch_size} x {world_size} ="
            f" {per_forward}",
        )
    return mini_batch // per_forward


def check_adapters(model: LoadedModelConfig, lora: LoraConfig, deepspeed: DeepspeedConfig) -> Iterator[Problem]:
    """What LoRA, quantisation, selective training and ZeRO rule out in each other."""
    if lora.enabled and model.trainable.mode != "all":
        yield Problem("model.trainable.mode", f"{model.trainable.mode} and lora.enabled=true exclude each other")
    if model.quantization == "nf4" and not lora.enabled:
        yield Problem("model.quantization", "nf4 weights cannot be trained; set lora.enabled=true (QLoRA)")
    if model.quantization == "nf4" and deepspeed.zero_stage == 3:
        yield Problem("deepspeed", "zero3 cannot shard nf4 weights; use deepspeed=zero2")
    offload = (deepspeed.json.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if model.dtype == "fp16" and offload.get("device", "none") != "none":
        yield Problem("model.dtype", "fp16 with an offloaded optimizer is not supported; use bf16")


def grad_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int | Problem:
    """global_batch_size / (micro_batch_size x world size), exact, or the problem that states the three numbers."""
    per_forward = micro_batch_size * world_size
    if global_batch_size % per_forward:
        fits = sorted(
            {
                max(per_forward, global_batch_size // per_forward * per_forward),
                (global_batch_size // per_forward + 1) * per_forward,
            }
        )
        return Problem(
            "train.global_batch_size",
            f"{global_batch_size} is not a multiple of train.micro_batch_size x number of ranks ="
            f" {micro_batch_size} x {world_size} = {per_forward}; allowed: {' or '.join(map(str, fits))},"
            " or another train.micro_batch_size",
        )
    return global_batch_size // per_forward


class StageInfo(NamedTuple):
    """name: as typed; config: its dataclass; summary: one line; groups: config groups it is composed of;
    module: the training module, named and not imported so that help stays fast; examples: for the help page."""

    name: str
    config: type
    summary: str
    groups: tuple[str, ...]
    module: str
    examples: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name as files and Python have it."""
        return self.name.replace("-", "_")


STAGES: dict[str, StageInfo] = {
    "sft": StageInfo(
        "sft",
        SftConfig,
        "supervised fine-tuning: full, LoRA, QLoRA, partly frozen, LISA; also pre-training from scratch",
        ("model", "lora", "data", "optim", "deepspeed", "launch"),
        "rlhf_cli.stages.sft",
        (
            "rlhf sft conf=shakespeare_bpe data.path=tinyshakespeare.txt run_dir=runs/plays",
            "rlhf sft conf=hh_rlhf_llama_7b model.path=/models/llama-7b data.path=data/hh_rlhf/sft optim.lr=1e-5",
            "rlhf sft model.path=runs/plays data.path=mine.jsonl lora=r16 deepspeed=zero3 launch.num_processes=2",
            "rlhf sft -m conf=my/own.yaml optim.lr=1e-5,3e-5",
        ),
    ),
    "rm": StageInfo(
        "rm",
        RmConfig,
        "reward model: pairwise, K-wise ranking, or labelled classes; full or LoRA",
        ("model", "lora", "data", "optim", "deepspeed", "launch"),
        "rlhf_cli.stages.rm",
        (
            "rlhf rm model.path=runs/hh_sft data.path=pairs.jsonl data.validation_split_percentage=10 run_dir=runs/rm",
            "rlhf rm conf=hh_rlhf_llama_7b model.path=runs/hh_sft_7b data.path=data/hh_rlhf/rm run_dir=runs/hh_rm_7b",
            "rlhf rm conf=shakespeare_sentiment model.path=runs/plays data.path=sentiment.jsonl run_dir=runs/mood",
            "rlhf rm -m model.path=runs/hh_sft data.path=pairs.jsonl lora=r16 optim.lr=1e-5,3e-5,1e-4",
        ),
    ),
    "ppo": StageInfo(
        "ppo",
        PpoConfig,
        "PPO against reward sources, with KL control; also rloo, grpo, reinforce++",
        ("lora", "generation", "reward", "optim", "deepspeed", "launch"),
        "rlhf_cli.stages.ppo",
        (
            "rlhf ppo model.path=runs/hh_sft data.path=prompts.jsonl 'reward.sources=[{path: runs/hh_rm_merged}]'",
            "rlhf ppo conf=hh_rlhf_llama_7b model.path=runs/hh_sft_7b 'reward.sources=[{path: runs/hh_rm_7b}]'",
            "rlhf ppo conf=shakespeare_happy model.path=runs/plays data.path=plays.txt"
            " 'reward.sources=[{type: classifier, path: runs/mood, label: happy}]'",
            "rlhf ppo -m model.path=runs/hh_sft data.path=prompts.jsonl 'reward.sources=[{path: runs/hh_rm_merged}]'"
            " ppo.kl_coef=0.01,0.05",
        ),
    ),
    "raft": StageInfo(
        "raft",
        RaftConfig,
        "reward-ranked fine-tuning: learn from the best of K own responses, repeat",
        ("lora", "generation", "reward", "optim", "deepspeed", "launch"),
        "rlhf_cli.stages.raft",
        (
            "rlhf raft model.path=runs/hh_sft data.path=prompts.jsonl 'reward.sources=[{path: runs/hh_rm_merged}]'",
            "rlhf raft conf=hh_rlhf_llama_7b model.path=runs/hh_sft_7b 'reward.sources=[{path: runs/hh_rm_7b_merged}]'",
            "rlhf raft conf=shakespeare_happy model.path=runs/plays data.path=plays.txt"
            " 'reward.sources=[{type: classifier, path: runs/mood, label: happy}]'",
            "rlhf raft -m model.path=runs/hh_sft data.path=prompts.jsonl 'reward.sources=[{path: runs/hh_rm_merged}]'"
            " raft.strategy=local,top",
        ),
    ),
    "merge-lora": StageInfo(
        "merge-lora",
        MergeLoraConfig,
        "adapter + base -> plain model, policy or reward model",
        (),
        "rlhf_cli.stages.merge_lora",
        (
            "rlhf merge-lora merge.adapter=runs/hh_rm_7b run_dir=runs/hh_rm_7b_merged",
            "rlhf merge-lora merge.adapter=some/peft_folder merge.base=/models/llama-7b merge.output_dtype=bf16",
        ),
    ),
    "score": StageInfo(
        "score",
        ScoreConfig,
        "rewards of responses or pairs from a file, by any reward source",
        ("launch",),
        "rlhf_cli.stages.score",
        (
            "rlhf score 'reward.sources=[{path: runs/rm}]' data.path=answers.jsonl run_dir=runs/scores",
            "rlhf score 'reward.sources=[{type: classifier, path: runs/mood, label: happy}]' data.path=texts.jsonl",
            "rlhf score 'reward.sources=[{type: function, path: my.py, function: brevity}]' data.path=pairs.jsonl",
        ),
    ),
}
