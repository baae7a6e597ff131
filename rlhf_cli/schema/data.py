"""Data: what is read, and how it becomes tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf_cli.errors import Problem
from rlhf_cli.schema.fields import opt, section

DataFormat = Literal["auto", "text_only", "text2text", "conversation", "paired", "ranked", "labelled", "prompts", "hh"]


TemplateName = Literal["auto", "hh", "chatml", "alpaca", "tokenizer", "none"]


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
class TokenSourceConfig(SourceConfig):
    """What is read and becomes sequences of tokens."""

    weights: list[float] | None = opt(
        None, "one per path: how often its rows are seen in an epoch (0.5 = half of them, 2 = twice)", gt=0
    )
    max_length: int = opt(512, "longest sequence in tokens", ge=2)
    deduplicate: bool = opt(False, "drop exact repeats of a row")
    cache_dir: str | None = opt(None, "where tokenised data is kept; null = $RLHF_CACHE or ~/.cache/rlhf")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.weights is not None:
            paths = [self.path] if isinstance(self.path, str) else self.path or []
            if len(self.weights) != len(paths):
                yield Problem("weights", f"has {len(self.weights)} entries, data.path has {len(paths)}; give one each")


@dataclass
class TrainingSourceConfig(TokenSourceConfig):
    """What is read to train on and to evaluate on."""

    template: TemplateName = opt(
        "auto", "how a dialogue becomes text; auto = the template of the model's run, else the tokenizer's, else none"
    )
    validation_split_percentage: float = opt(
        0.0,
        "the last percent of the rows are for evaluation only; rm: of labelled rows that share of each label",
        ge=0,
        lt=100,
    )
    eval_path: str | list[str] | None = opt(None, "data for evaluation instead of a split")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.eval_path and self.validation_split_percentage:
            yield Problem("eval_path", "contradicts data.validation_split_percentage; drop one of the two")


@dataclass
class TextDataConfig(TokenSourceConfig):
    """Text and dialogues for a language-model loss."""

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
class DataConfig(TextDataConfig, TrainingSourceConfig):
    """What is read and how it becomes tokens."""


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
class PromptDataConfig(SourceConfig):
    """Prompts that a policy answers."""

    template: TemplateName = opt(
        "auto", "how a dialogue becomes text; auto = the template of the model's run, else the tokenizer's, else none"
    )
    max_prompt_length: int = opt(256, "longest prompt in tokens", ge=1)
    overlong: Literal["drop", "truncate"] = opt(
        "drop", "a prompt over max_prompt_length is dropped and counted, or loses its start"
    )
    prompt_tokens: int = opt(16, "a plain .txt file gives prompts of so many tokens, cut at every line's start", ge=1)
    validation_split_percentage: float = opt(
        0.0, "the last percent of the prompts are for evaluation only", ge=0, lt=100
    )
    eval_path: str | list[str] | None = opt(None, "prompts for evaluation instead of a split")
    deduplicate: bool = opt(False, "drop exact repeats of a prompt")

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if self.eval_path and self.validation_split_percentage:
            yield Problem("eval_path", "contradicts data.validation_split_percentage; drop one of the two")


@dataclass
class PtxDataConfig(TextDataConfig):
    """Pretraining text beside the prompts; needed only when its loss has a weight. Dialogues go through the policy's
    template, and nothing is held out."""

    def check(self) -> Iterator[Problem]:
        if self.path:
            yield from super().check()
