"""The sections of a config. One dataclass each; `check` yields problems and never changes a value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt, section

DataFormat = Literal["auto", "text_only", "text2text", "conversation", "paired", "ranked", "labelled", "prompts", "hh"]
TemplateName = Literal["auto", "hh", "chatml", "alpaca", "tokenizer", "none"]


@dataclass
class ArchConfig:
    """Architecture of a model from scratch (model.init=scratch)."""

    type: Literal["llama", "gpt2", "gpt_neox", "qwen3"] = opt("llama", "model family")
    hidden_size: int = opt(256, "width of the residual stream", ge=8)
    num_layers: int = opt(4, "transformer blocks", ge=1)
    num_heads: int = opt(4, "attention heads; divides hidden_size", ge=1)
    num_kv_heads: int | None = opt(None, "key/value heads (llama, qwen3); null = num_heads", ge=1)
    intermediate_size: int | None = opt(None, "width of the MLP; null = 4 x hidden_size, or 8/3 x for gated ones", ge=8)
    max_positions: int | None = opt(None, "longest sequence; null = data.max_length, at least 1024", ge=8)
    tie_embeddings: bool = opt(False, "input and output embeddings are one matrix")
    dropout: float = opt(0.0, "dropout while training (gpt2, gpt_neox; attention only in llama, qwen3)", ge=0, lt=1)

    def check(self) -> Iterator[Problem]:
        if self.hidden_size % self.num_heads:
            yield Problem("num_heads", f"{self.num_heads} does not divide arch.hidden_size = {self.hidden_size}")
        elif self.hidden_size // self.num_heads % 2:
            yield Problem("num_heads", f"hidden_size / num_heads = {self.hidden_size // self.num_heads} must be even")
        if self.num_kv_heads is not None:
            if self.type not in ("llama", "qwen3"):
                yield Problem("num_kv_heads", f"is for llama and qwen3 only, arch.type is {self.type}")
            elif self.num_heads % self.num_kv_heads:
                yield Problem("num_kv_heads", f"{self.num_kv_heads} does not divide arch.num_heads = {self.num_heads}")


@dataclass
class TokenizerConfig:
    """Which tokenizer a model uses."""

    path: str | None = opt(None, "run directory, local directory or hub id; null = the model's own")
    train: Literal["none", "bpe", "word", "char"] = opt(
        "none", "train one on the data (model.init=scratch): byte-level BPE, words with their spaces, or characters"
    )
    vocab_size: int = opt(4096, "largest vocabulary of a trained tokenizer", ge=16)
    extra_tokens: list[str] = opt([], "tokens to add, such as runs of whitespace for code; embeddings are resized")


@dataclass
class TrainableConfig:
    """Which parameters of the model are trained (without LoRA)."""

    mode: Literal["all", "last_layers", "patterns", "lisa"] = opt(
        "all", "all; the last blocks + final norm; names that match patterns; or LISA (arXiv 2403.17919)"
    )
    last_layers: int = opt(1, "mode last_layers: how many of the last blocks", ge=0)
    patterns: list[str] = opt([], "mode patterns: regular expressions searched in parameter names")
    lisa_layers: int = opt(2, "mode lisa: middle blocks trained at a time; embeddings and head always are", ge=1)
    lisa_interval: int = opt(20, "mode lisa: steps between two draws of the blocks", ge=1)

    def check(self) -> Iterator[Problem]:
        if self.mode == "patterns" and not self.patterns:
            yield Problem("patterns", "is empty; name at least one pattern such as 'layers\\.3\\.'")


@dataclass
class ModelConfig:
    """The model to start from."""

    path: str | None = opt(None, "run directory, local HF directory, or hub id")
    revision: str | None = opt(None, "branch, tag or commit of a hub id")
    init: Literal["pretrained", "scratch"] = opt("pretrained", "load weights, or make random ones from model.arch")
    arch: ArchConfig = section(ArchConfig, "architecture of a model from scratch")
    tokenizer: TokenizerConfig = section(TokenizerConfig, "tokenizer")
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = opt(
        "auto", "precision of weights and matrix products; auto = bf16 on a GPU (fp16 where it lacks that), fp32 on CPU"
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = opt(
        "auto", "attention kernel; auto = what transformers picks"
    )
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, 1/3 slower")
    trust_remote_code: bool = opt(False, "run Python code that comes with a model; only for sources you trust")
    quantization: Literal["none", "nf4"] = opt("none", "nf4: 4-bit frozen weights under LoRA (QLoRA); GPU only")
    trainable: TrainableConfig = section(TrainableConfig, "which parameters are trained")

    def check(self) -> Iterator[Problem]:
        if self.init == "pretrained":
            if not self.path:
                yield Problem(
                    "path",
                    "is required: a run directory, a local HF directory or a hub id"
                    " (or model.init=scratch for a new model)",
                )
            if self.tokenizer.train != "none":
                yield Problem(
                    "tokenizer.train",
                    f"{self.tokenizer.train} needs model.init=scratch: a pretrained model comes with its tokenizer",
                )
        else:
            if self.path:
                yield Problem("path", "contradicts model.init=scratch; drop one of the two")
            if self.tokenizer.train == "none" and not self.tokenizer.path:
                yield Problem(
                    "tokenizer",
                    "a model from scratch needs model.tokenizer.train=bpe|word|char or model.tokenizer.path",
                )
            if self.quantization != "none":
                yield Problem("quantization", "nf4 needs pretrained weights")
        if self.tokenizer.train != "none" and self.tokenizer.path:
            yield Problem("tokenizer.path", "contradicts model.tokenizer.train; drop one of the two")


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685)."""

    enabled: bool = opt(False, "train an adapter instead of the model")
    r: int = opt(16, "rank of the adapter matrices", ge=1)
    alpha: float = opt(32.0, "scale is alpha / r", gt=0)
    dropout: float = opt(0.0, "dropout in front of the adapter", ge=0, lt=1)
    target_modules: str | list[str] = opt("all-linear", "module names, or all-linear (every linear layer but the head)")


@dataclass
class FilterConfig:
    """Filters for code and web text (Codex, arXiv 2107.03374); a row that fails is dropped and counted."""

    max_mean_line_length: float | None = opt(None, "drop a text whose mean line is longer (Codex: 100)", gt=0)
    max_line_length: int | None = opt(None, "drop a text with a longer line (Codex: 1000)", gt=0)
    min_alphanumeric_share: float | None = opt(
        None, "drop a text with a smaller share of letters and digits", ge=0, le=1
    )
    drop_generated: bool = opt(False, "drop files marked as generated in their first lines")


@dataclass
class SourceConfig:
    """What is read."""

    path: str | list[str] | None = opt(None, "file, directory, glob, or hub id; or a list of these")
    split: str = opt("train", "split of a hub data set")
    format: DataFormat = opt("auto", "how a row is read; auto = told from the column names")
    columns: dict[str, str] = opt({}, "our name: the file's own column name, e.g. {prompt: question, response: answer}")
    limit: int | None = opt(None, "use the first rows only", ge=1)
    on_bad_row: Literal["error", "skip"] = opt(
        "error", "a row that cannot be read stops the run, or is counted and left out"
    )

    def check(self) -> Iterator[Problem]:
        if not self.path:
            yield Problem("path", "is required: a file, directory, glob or hub id, or a list of these")


@dataclass
class TrainingSourceConfig(SourceConfig):
    """What is read to train on and to evaluate on."""

    template: TemplateName = opt(
        "auto", "how a dialogue becomes text; auto = the template of the model's run, else the tokenizer's, else none"
    )
    weights: list[float] | None = opt(
        None, "one per path: how often its rows are seen in an epoch (0.5 = half of them, 2 = twice)", gt=0
    )
    max_length: int = opt(512, "longest sequence in tokens", ge=2)
    validation_split_percentage: float = opt(
        0.0,
        "the last percent of the rows are for evaluation only; rm: of labelled rows that share of each label",
        ge=0,
        lt=100,
    )
    eval_path: str | list[str] | None = opt(None, "data for evaluation instead of a split")
    deduplicate: bool = opt(False, "drop exact repeats of a row")
    cache_dir: str | None = opt(None, "where tokenised data is kept; null = $RLHF_CACHE or ~/.cache/rlhf")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.weights is not None:
            paths = [self.path] if isinstance(self.path, str) else self.path or []
            if len(self.weights) != len(paths):
                yield Problem("weights", f"has {len(self.weights)} entries, data.path has {len(paths)}; give one each")
        if self.eval_path and self.validation_split_percentage:
            yield Problem("eval_path", "contradicts data.validation_split_percentage; drop one of the two")


@dataclass
class DataConfig(TrainingSourceConfig):
    """What is read and how it becomes tokens."""

    row_format: str | None = opt(
        None, "text made of a row's columns, e.g. '{prompt}{label}'; the row is then text_only"
    )
    loss_on: Literal["auto", "completion", "all"] = opt(
        "auto", "tokens that are trained; auto = the completion where there is a prompt, all in plain text"
    )
    packing: bool = opt(False, "several short rows in one sequence, without attention between them")
    overlong: Literal["auto", "drop", "truncate", "split"] = opt(
        "auto", "rows over max_length; auto = split plain text into windows, truncate the rest"
    )
    filters: FilterConfig = section(FilterConfig, "filters for code and web text")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.row_format and self.format not in ("auto", "text_only"):
            yield Problem("row_format", f"makes text_only rows, but data.format is {self.format}")


@dataclass
class ComparisonDataConfig(TrainingSourceConfig):
    """Pairs, rankings or labelled texts."""

    format: Literal["auto", "paired", "ranked", "labelled", "hh"] = opt(
        "auto", "pairs (paired, or hh: Anthropic's layout), rankings, or labelled texts; auto = told from the columns"
    )
    overlong: Literal["drop", "truncate"] = opt(
        "drop", "a row with a sequence over max_length is dropped and counted, or loses its end (and so its EOS)"
    )
    split_seed: int = opt(
        0, "which labelled rows are for evaluation: drawn class by class, since such files are often sorted", ge=0
    )


@dataclass
class ComparisonConfig:
    """What a reward model learns from comparisons and labels, and how its scores are described."""

    center_coef: float = opt(
        0.0, "pairs and rankings: weight of (r_better + r_worse)^2, which keeps scores around 0; 0.01 is usual", ge=0
    )
    share_prompts: Literal["auto", "never"] = opt(
        "auto", "pairs and rankings: compute a prompt once for all its answers, where the model allows it and it pays"
    )
    class_weights: Literal["none", "balanced"] = opt("none", "labels: balanced = every class weighs the same")
    reference: Literal["chosen", "rejected", "all"] = opt(
        "chosen", "responses of the evaluation rows whose score mean and std are stored for ppo and raft"
    )
    num_worst: int = opt(20, "worst-ranked evaluation rows written to samples/ at each evaluation", ge=0)


@dataclass
class MergeConfig:
    """Which adapter is merged, into what, and how the result is written."""

    adapter: str | None = opt(None, "run directory of a LoRA run, or a folder in PEFT's layout")
    base: str | None = opt(
        None, "run directory, local HF directory or hub id; null = the one named by the manifest or adapter_config.json"
    )
    base_revision: str | None = opt(None, "branch, tag or commit of a hub id")
    output_dtype: Literal["auto", "bf16", "fp32", "fp16"] = opt(
        "auto", "precision of the written weights; auto = that of the base. The arithmetic is fp32"
    )
    max_shard_size: str = opt("5GB", "largest file of weights, e.g. 500MB or 2GiB")
    verify: Literal["auto", "always", "never"] = opt(
        "auto", "compare the result with base + adapter on a few inputs; auto = when two models fit into memory"
    )
    allow_pickle: bool = opt(False, "read adapter_model.bin, a pickle (tensors only); for sources you trust")
    trust_remote_code: bool = opt(False, "run Python code that comes with the base; only for sources you trust")

    def check(self) -> Iterator[Problem]:
        if not self.adapter:
            yield Problem("adapter", "is required: a run directory of a LoRA run, or a folder in PEFT's layout")
        size = re.fullmatch(r"(\d+(\.\d+)?)\s*([KMGT]i?)?B", self.max_shard_size, re.IGNORECASE)
        if size is None or float(size[1]) == 0:
            yield Problem("max_shard_size", f"got {self.max_shard_size!r}; allowed: a size such as 500MB, 5GB or 2GiB")


@dataclass
class RewardSourceConfig:
    """One source of rewards."""

    type: Literal["model", "classifier", "function", "rouge", "http"] = opt(
        "model",
        "model: a reward model (run directory, local HF directory, hub id); classifier: one label of a classifier;"
        " function: Python; rouge: overlap with a reference column; http: a scoring server",
    )
    path: str | None = opt(None, "model, classifier: where it is; function: the .py file (null = function is dotted)")
    revision: str | None = opt(None, "model, classifier: branch, tag or commit of a hub id")
    name: str | None = opt(None, "under which it is logged; null = its type, numbered if there are several")
    weight: float = opt(1.0, "factor in the sum of all sources")
    label: str | int | None = opt(
        None, "classifier (or model with several labels): the wanted label, by name or number"
    )
    measure: Literal["log_prob", "probability", "margin"] = opt(
        "log_prob", "what of the label: its log-probability, its probability, or its logit minus the best other one"
    )
    sees: Literal["dialogue", "response"] = opt("dialogue", "prompt and response, or the response alone")
    template: TemplateName = opt("auto", "model, classifier: how a dialogue becomes text; as data.template")
    max_length: int = opt(2048, "model, classifier: longest input in tokens; a longer one loses its start", ge=2)
    dtype: Literal["auto", "bf16", "fp32", "fp16"] = opt("auto", "model, classifier: precision; as model.dtype")
    trust_remote_code: bool = opt(False, "model, classifier: run Python code that comes with it")
    function: str | None = opt(None, "function: f(prompts, responses, **columns) -> list of numbers, by (dotted) name")
    reference: str = opt("reference", "rouge: the column with the reference text")
    rouge: Literal["rouge1", "rouge2", "rougeL"] = opt("rougeL", "rouge: which F-measure")
    url: str | None = opt(None, "http: POSTed {prompts, responses, columns}, must answer {rewards: [...]}")
    timeout: float = opt(30.0, "http: seconds to wait for an answer", gt=0)
    retries: int = opt(4, "http: further tries after a failure that may pass, each after twice the time", ge=0)

    # option: the types that read it. Setting it on another type would be ignored, so it is refused.
    BELONGS = {
        "path": ("model", "classifier", "function"),
        "revision": ("model", "classifier"),
        "label": ("model", "classifier"),
        "measure": ("model", "classifier"),
        "max_length": ("model", "classifier"),
        "dtype": ("model", "classifier"),
        "trust_remote_code": ("model", "classifier"),
        "sees": ("model", "classifier"),
        "template": ("model", "classifier"),
        "function": ("function",),
        "reference": ("rouge",),
        "rouge": ("rouge",),
        "url": ("http",),
        "timeout": ("http",),
        "retries": ("http",),
    }  # fmt: skip

    def check(self) -> Iterator[Problem]:
        default = RewardSourceConfig()
        for option, types in self.BELONGS.items():
            if self.type not in types and getattr(self, option) != getattr(default, option):
                yield Problem(option, f"is not read by type {self.type}; it belongs to {' and '.join(types)}")
        if self.type in ("model", "classifier") and not self.path:
            yield Problem("path", f"is required by type {self.type}: a run directory, local HF directory or hub id")
        if self.type == "classifier" and self.label is None:
            yield Problem("label", "is required by type classifier: the wanted label, by name or number")
        if self.type == "function" and not self.function:
            yield Problem("function", "is required by type function: a name in the file at path, or a dotted name")
        elif self.type == "function" and not self.path and "." not in str(self.function):
            yield Problem(
                "function",
                f"{self.function!r} is no dotted name; set path to its file, or write module.{self.function}",
            )
        if self.type == "http" and not self.url:
            yield Problem("url", "is required by type http, e.g. http://localhost:8000/score")


@dataclass
class RewardConfig:
    """What scores a response."""

    sources: list[RewardSourceConfig] = opt([], "what scores; the reward is the weighted sum")
    normalize: bool = opt(
        False, "bring each reward model's score to mean 0 and std 1, with the moments in its manifest"
    )
    clip: float | None = opt(None, "rewards are kept within -clip and clip, after normalisation", gt=0)
    batch_size: int = opt(16, "sequences per forward pass of a reward model", ge=1)

    def check(self) -> Iterator[Problem]:
        if not self.sources:
            yield Problem("sources", "is required, e.g. reward.sources=[{type: model, path: runs/rm}]")
        names = [source.name for source in self.sources if source.name]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield Problem("sources", f"has a name twice: {', '.join(twice)}")


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = opt(2e-5, "highest learning rate", gt=0)
    betas: list[float] = opt([0.9, 0.999], "Adam's decay rates", ge=0, lt=1)
    eps: float = opt(1e-8, "Adam's epsilon", gt=0)
    weight_decay: float = opt(0.0, "decoupled decay of matrices (not of biases and norms)", ge=0)
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = opt(
        "cosine", "after the warm-up: constant, linear to min_lr_ratio, cosine to it, or 1/sqrt(step) (Noam)"
    )
    min_lr_ratio: float = opt(0.1, "lr at the end / lr (linear and cosine); Llama 2 uses 0.1", ge=0, le=1)
    warmup_ratio: float = opt(0.03, "share of the steps with growing lr", ge=0, le=1)
    min_warmup_steps: int = opt(5, "at least so many steps of warm-up when warmup_ratio > 0", ge=0)
    max_grad_norm: float = opt(1.0, "gradients are scaled down to this norm; 0 = never", ge=0)

    def check(self) -> Iterator[Problem]:
        if len(self.betas) != 2:
            yield Problem("betas", f"needs two numbers, got {len(self.betas)}")


@dataclass
class EarlyStoppingConfig:
    """Stop when the evaluation loss no longer falls."""

    patience: int = opt(0, "evaluations without a better loss until the run stops; 0 = never stop", ge=0)
    min_delta: float = opt(0.0, "a smaller fall does not count as better", ge=0)


@dataclass
class TrainConfig:
    """Length and rhythm of the training."""

    epochs: float = opt(1.0, "passes over the data", gt=0)
    max_steps: int | None = opt(None, "optimizer steps; overrides epochs (the data repeats)", ge=1)
    global_batch_size: int = opt(64, "rows per optimizer step, over all ranks", ge=1)
    micro_batch_size: int = opt(
        8,
        "rows per forward pass of one rank, on average: fewer of the long ones, more of the short;"
        " rm: a ranking of K answers counts as K / 2 pairs",
        ge=1,
    )
    eval_every: int = opt(0, "steps between evaluations; 0 = at the end only", ge=0)
    save_every: int = opt(0, "steps between checkpoints; 0 = only when the run is interrupted", ge=0)
    log_every: int = opt(1, "steps between lines in metrics.jsonl", ge=1)
    keep_checkpoints: int = opt(2, "newest checkpoints that stay on disk", ge=1)
    seed: int = opt(0, "order of the data, initial weights, dropout", ge=0)
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig, "stop when evaluation no longer improves")

    def check(self) -> Iterator[Problem]:
        if self.early_stopping.patience and not self.eval_every:
            yield Problem("early_stopping.patience", "needs evaluations: set train.eval_every")


@dataclass
class DeepspeedConfig:
    """How the training is spread over the ranks; chosen by one word, e.g. deepspeed=zero3."""

    name: str = opt("zero2", "the chosen group: zero0 zero1 zero2 zero3 zero2_offload zero3_offload")
    json: dict[str, Any] = opt(
        {},
        "DeepSpeed's own settings, passed through; batch sizes, accumulation, precision, optimizer,"
        " scheduler and clipping are derived",
    )

    OWNED = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "bf16",
        "fp16",
        "gradient_clipping",
        "managed_gradient_accumulation",
        "data_types",
        "prescale_gradients",
        "gradient_predivide_factor",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    )
    # Parts of ZeRO that keep optimizer state where our checkpoints do not look, or in another form.
    UNSUPPORTED = ("zenflow", "elastic_checkpoint", "zeropp_loco_param")

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that was asked for, 0 to 3."""
        return int((self.json.get("zero_optimization") or {}).get("stage", 0))

    def check(self) -> Iterator[Problem]:
        for key in self.OWNED:
            if key in self.json:
                yield Problem(f"json.{key}", "is derived from model, optim and train; remove it")
        stage = (self.json.get("zero_optimization") or {}).get("stage", 0)
        if stage not in (0, 1, 2, 3):
            yield Problem("json.zero_optimization.stage", f"is {stage!r}; allowed: 0, 1, 2, 3")
        yield from self._check_zero(self.json.get("zero_optimization") or {}, stage)

    def _check_zero(self, zero: dict[str, Any], stage: int) -> Iterator[Problem]:
        for key in ("offload_optimizer", "offload_param"):
            offload = zero.get(key) or {}
            if offload.get("device", "none") not in ("none", "cpu"):
                yield Problem(
                    f"json.zero_optimization.{key}.device", f"is {offload['device']!r}; allowed: none, cpu (no nvme)"
                )
            if offload.get("super_offload") or offload.get("ratio", 1.0) != 1.0:
                yield Problem(f"json.zero_optimization.{key}", "super_offload and ratio are not supported; remove them")
        for key in self.UNSUPPORTED:
            if zero.get(key):
                yield Problem(f"json.zero_optimization.{key}", "is not supported; remove it")
        if zero.get("overlap_comm") and stage in (0, 1):
            yield Problem("json.zero_optimization.overlap_comm", f"needs stage 2 or 3, but stage is {stage}")


@dataclass
class LaunchConfig:
    """How the ranks are started."""

    num_processes: int | Literal["auto"] = opt(
        "auto", "ranks on this machine; auto = every visible GPU, or 1 on CPU", ge=1
    )
    launcher: Literal["auto", "elastic", "deepspeed", "slurm"] = opt(
        "auto", "elastic: this machine; deepspeed: the nodes of hostfile; slurm: srun inside an allocation"
    )
    hostfile: str | None = opt(None, "DeepSpeed hostfile for several machines")
    master_port: int | Literal["auto"] = opt("auto", "port of rank 0; auto = a free one", ge=1, le=65535)
    timeout: float = opt(1800.0, "seconds after which a collective that does not answer fails", gt=0)

    def check(self) -> Iterator[Problem]:
        if self.launcher == "deepspeed" and not self.hostfile:
            yield Problem("hostfile", "is required with launch.launcher=deepspeed")
        if self.hostfile and self.launcher in ("elastic", "slurm"):
            yield Problem("hostfile", f"is not used by launch.launcher={self.launcher}; drop it or use deepspeed")


@dataclass
class GenerationConfig:
    """Sample texts written at each evaluation."""

    prompts: list[str] = opt([], "fixed prompts; empty = the first ones of the evaluation data")
    num_prompts: int = opt(4, "how many to take from the evaluation data; 0 = write no samples", ge=0)
    max_new_tokens: int = opt(128, "longest text", ge=1)
    temperature: float = opt(1.0, "0 = always the likeliest token", ge=0)
    top_k: int = opt(0, "only the k likeliest tokens; 0 = all", ge=0)
    top_p: float = opt(1.0, "only the likeliest tokens with this share of probability", gt=0, le=1)
    stop: list[str] = opt([], "strings that end a text, beside the template's own")


@dataclass
class ProgressConfig:
    """Where progress is shown."""

    progress: Literal["auto", "bar", "lines", "none"] = opt("auto", "auto = a bar in a terminal, lines elsewhere")


@dataclass
class LoggingConfig(ProgressConfig):
    """Where progress is shown; metrics.jsonl is always written."""

    tensorboard: bool = opt(True, "write tensorboard/ in the run directory")
    wandb: bool = opt(False, "log to Weights & Biases (pip install wandb)")
    wandb_project: str = opt("rlhf", "project in Weights & Biases")
