"""Errors that a user can cause. Each carries one clear message; the command line shows it without a traceback."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE, EXIT_FAILED, EXIT_BAD_REQUEST = 0, 1, 2


class RlhfError(Exception):
    """What the user asked for cannot be done. The message says what, where, what is allowed, what to do."""

    exit_code = EXIT_BAD_REQUEST


class DataError(RlhfError):
    """A file or a row that cannot be used; the message names the file and the row."""


class ModelError(RlhfError):
    """A model, tokenizer or adapter that cannot be used where it was asked for."""


class CheckpointError(RlhfError):
    """Saved state that cannot be used, or that belongs to another configuration."""


class RunFailed(RlhfError):
    """The run started and broke: a dead rank, a full disk, a loss that is no longer a number."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a request.

    key: the config key ("optim.lr"), or "" when the problem belongs to none.
    message: what is wrong and what is allowed, without the key.
    """

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(RlhfError):
    """All problems of a request, reported together."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("\n".join(str(p) for p in problems))
