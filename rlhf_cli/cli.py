"""`rlhf STAGE [conf=...] [key=value ...]` and `rlhf report RUN_DIR...`. Never imports torch; help needs no Hydra."""

from __future__ import annotations

import difflib
import errno
import os
import sys

from rlhf_cli import __version__
from rlhf_cli.errors import EXIT_DONE, ConfigError, Problem, RlhfError
from rlhf_cli.schema import STAGES

FLAGS = "--help -h, --cfg job, --dry-run, -m --multirun"


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    try:
        return flushed(_dispatch(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        _show(error.problems)
        return error.exit_code
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return flushed(EXIT_DONE)


def flushed(exit_code: int) -> int:
    """exit_code, with nothing left to be written. `rlhf sft --help | head`: the reader is gone; a closed terminal
    likewise: no error of ours, and Python must not make one of it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return exit_code


def echo(text: str) -> None:
    """Words of the front to the user: standard error, so that standard output stays usable."""
    print(text, file=sys.stderr, flush=True)


def _dispatch(argv: list[str]) -> int:
    from rlhf_cli import help

    if not argv or argv[0] in ("--help", "-h", "help"):
        print(help.overview())
        return EXIT_DONE
    if argv[0] == "--version":
        print(f"rlhf {__version__}")
        return EXIT_DONE
    if argv[0] == "completion":
        print(help.BASH_COMPLETION, end="")
        return EXIT_DONE
    if argv[0] == "__complete":
        print("\n".join(help.completions(argv[1:])))
        return EXIT_DONE
    if argv[0] == "report":
        return _report(argv[1:])
    if argv[0] not in STAGES:
        close = difflib.get_close_matches(argv[0], [*STAGES, "report"], n=1)
        hint = f"did you mean `rlhf {close[0]}`? " if close else ""
        raise ConfigError([Problem("", f"no stage {argv[0]!r}; {hint}stages: {', '.join(STAGES)}")])
    return _stage(argv[0], argv[1:])


def _stage(stage: str, words: list[str]) -> int:
    flags, overrides = _split_flags(words)
    if "--help" in flags:
        from rlhf_cli.help import stage_help

        print(stage_help(STAGES[stage]))
        return EXIT_DONE
    if "--cfg" in flags:
        return _print_config(stage, overrides)
    # The slow imports (Hydra, 0.15 s) come only where they are needed.
    from rlhf_cli import job

    if "--multirun" in flags:
        from rlhf_cli.sweep import run_sweep

        return run_sweep(stage, overrides, echo)
    if "--dry-run" in flags:
        return job.dry_run(stage, overrides, echo)
    return job.run(stage, overrides, echo).exit_code


def _report(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        from rlhf_cli.help import REPORT_HELP

        print(REPORT_HELP, end="")
        return EXIT_DONE
    from rlhf_cli.report.write import read_words, write_report

    written = write_report(*read_words(words))
    for problem in written.problems:
        echo(f"note: {problem}")
    runs = "1 run" if written.num_runs == 1 else f"{written.num_runs} runs"
    print(f"{written.path}: {runs}, {written.path.stat().st_size / 1024:,.0f} KiB")
    return EXIT_DONE


def _split_flags(words: list[str]) -> tuple[set[str], list[str]]:
    flags: set[str] = set()
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--help", "-h"):
            flags.add("--help")
        elif word == "--dry-run":
            flags.add("--dry-run")
        elif word in ("-m", "--multirun"):
            flags.add("--multirun")
        elif word in ("--cfg", "-c") or word.startswith("--cfg="):
            what = word.partition("=")[2] or next(rest, "")
            if what != "job":
                raise ConfigError([Problem("", f"--cfg {what}: allowed: --cfg job")])
            flags.add("--cfg")
        elif word.startswith("-"):
            hint = f"; write {word.lstrip('-')} without dashes" if "=" in word else ""
            raise ConfigError([Problem("", f"no flag {word!r}{hint}; flags: {FLAGS}")])
        else:
            overrides.append(word)
    return flags, overrides


def _print_config(stage: str, overrides: list[str]) -> int:
    import yaml

    from rlhf_cli.config.compose import compose_stage

    composed = compose_stage(stage, overrides)
    if composed.problems:
        raise ConfigError(composed.problems)
    print(yaml.safe_dump(composed.values, sort_keys=False, allow_unicode=True), end="")
    return EXIT_DONE


def _show(problems: list[Problem]) -> None:
    if len(problems) == 1:
        print(f"error: {problems[0]}", file=sys.stderr)
        return
    print(f"error: {len(problems)} problems, nothing was started:", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
