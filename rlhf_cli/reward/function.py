"""Rewards from a Python function that the user names: f(prompts, responses, **columns) -> list of numbers."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from rlhf_cli.errors import ConfigError, Problem, RunFailed
from rlhf_cli.reward.source import Progress, ScoredText, checked_rewards, columns_of
from rlhf_cli.schema import RewardSourceConfig

MODULE_PREFIX = "rlhf_reward_"


@dataclass
class FunctionSource:
    """A function called once per batch. wanted: the columns it takes by name; takes_all: it has **kwargs."""

    name: str
    weight: float
    function: Callable[..., Any]
    about: str
    wanted: dict[str, bool]  # column -> whether it has no default
    takes_all: bool

    def score(self, texts: Sequence[ScoredText], progress: Progress) -> list[float]:
        """Call the function with prompts without template, responses and the columns it takes."""
        if not texts:
            return []
        who = f"reward source {self.name!r} ({self.about})"
        columns = columns_of(texts)
        missing = [column for column, required in self.wanted.items() if required and column not in columns]
        if missing:
            raise RunFailed(
                f"{who} needs the column {missing[0]!r}, which the data does not have; its further columns are"
                f" {', '.join(columns) or '(none)'}. Rename one with data.columns, or give the parameter a default"
            )
        passed = {
            column: values
            for column, values in columns.items()
            if column in self.wanted or (self.takes_all and column not in ("prompts", "responses"))
        }
        try:
            values = self.function([text.asked for text in texts], [text.response for text in texts], **passed)
        except (Exception, SystemExit) as error:  # sys.exit() in a function would end the rank as if all were well
            raise RunFailed(f"{who} raised {_described(error, self.function)}") from error
        rewards = checked_rewards(values, texts, who)
        progress(len(texts))
        return rewards


def open_function(config: RewardSourceConfig, name: str, key: str) -> FunctionSource:
    """Import what reward.sources[].function names. key: the source's place in the config, for messages."""
    assert config.function is not None, "checked by the schema"
    if config.path is None:
        module_name, _, attribute = config.function.rpartition(".")
        if not module_name:
            raise _problem(
                f"{key}.function", f"{config.function!r} is no dotted name; set path to its file, or use module.name"
            )
        module = _run_import(lambda: importlib.import_module(module_name), f"{key}.function", module_name)
    else:
        attribute = config.function
        module = _load_file(Path(config.path).expanduser(), f"{key}.path")
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__ and n[0] != "_"
        ]
        raise _problem(
            f"{key}.function",
            f"{config.path or module.__name__} has no function {attribute!r}; its functions are"
            f" {', '.join(own) or '(none)'}",
        )
    wanted, takes_all = _parameters(found, key)
    return FunctionSource(name, config.weight, found, _place(found, attribute), wanted, takes_all)


class _FromSource(SourceFileLoader):
    """Without bytecode: that of an edit in the same second and of the same length would pass for this one's."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise _problem(key, f"no such file: {path}")
    # A name of its own, since the file may be called as a module of the library.
    name = f"{MODULE_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise _problem(key, f"{path} is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # as for a script: it may import what lies beside it
    loader = spec.loader
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    _run_import(lambda: loader.exec_module(module), key, str(path))
    return module


def _run_import(load: Callable[[], Any], key: str, what: str) -> Any:
    """Whatever the user's module raises while it is imported becomes one line about that module."""
    try:
        return load()
    except SyntaxError as error:
        raise _problem(key, f"{what} is no valid Python: {error.filename}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise _problem(key, f"{what} cannot be imported: {_described(error, None)}") from error


def _parameters(function: Callable[..., Any], key: str) -> tuple[dict[str, bool], bool]:
    """(columns that the function takes -> required, whether it takes any)."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some built-in callables tell nothing of themselves
        return {}, False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise _problem(
            f"{key}.function", f"{function!r} must take (prompts, responses, ...), it takes {len(positional)} arguments"
        )
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in positional[:2]]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default is p.empty for p in by_name}, takes_all


def _place(function: Callable[..., Any], name: str) -> str:
    code: CodeType | None = getattr(inspect.unwrap(function), "__code__", None)
    return name if code is None else f"{name}, {code.co_filename}:{code.co_firstlineno}"


def _described(error: BaseException, function: Callable[..., Any] | None) -> str:
    """The error in one line with the line of the user's code that it came from."""
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    # The deepest line in the user's own file tells more than one inside a library it calls.
    own = [f for f in frames if code is not None and f.filename == code.co_filename] or frames[-1:]
    return f"{text} (in {own[-1].filename}:{own[-1].lineno})" if own else text


def _problem(key: str, message: str) -> ConfigError:
    return ConfigError([Problem(key, message)])
