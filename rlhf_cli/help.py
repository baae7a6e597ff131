"""What `rlhf --help` and `rlhf STAGE --help` print, generated from the schema and the recipes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
import typing
from typing import Any

from rlhf_cli import __version__
from rlhf_cli.config.tree import options, recipes
from rlhf_cli.schema import STAGES, StageInfo, known_keys
from rlhf_cli.schema.build import describe_type, item_class

EXIT_CODES = (
    "exit codes: 0 done, 1 the run failed, 2 the request is wrong (nothing started), 130/143 interrupted, state saved"
)


def overview() -> str:
    """All stages, one line each."""
    lines = [
        f"rlhf {__version__}: the RLHF pipeline, one stage after the other",
        "",
        "usage: rlhf STAGE [conf=RECIPE] [key=value ...]",
        "",
    ]
    lines += [f"  {s.name:<11} {s.summary}" for s in STAGES.values()]
    lines += [
        f"  {'report':<11} one HTML page about any runs: chain, curves, responses side by side, time, settings",
        f'  {"completion":<11} print a script that completes commands in bash: eval "$(rlhf completion bash)"',
        "",
    ]
    lines += [
        "rlhf STAGE --help     every option, the recipes, examples",
        "rlhf STAGE --cfg job  the composed config, nothing started",
        "",
    ]
    return "\n".join([*lines, EXIT_CODES])


def stage_help(stage: StageInfo) -> str:
    """Purpose, usage, every option with meaning, default and allowed values, groups, recipes, examples."""
    out = [
        f"rlhf {stage.name}: {stage.summary}",
        "",
        f"usage: rlhf {stage.name} [conf=NAME|PATH.yaml|RUN_DIR/config.yaml] [key=value ...]",
        "",
    ]
    out += [
        "  --cfg job    print the composed config and stop",
        "  --dry-run    check everything, open data and model, estimate steps and memory; start nothing",
        "  -m           sweep: key=a,b runs one after the other",
        "  --help       this page",
        "",
    ]
    out += ["examples:"] + [f"  {e}" for e in stage.examples] + [""]
    shipped = recipes(stage)
    if shipped:
        width = max(len(r.name) for r in shipped)
        out += ["recipes (conf=NAME):", *(f"  {r.name:<{width}}  {r.purpose}" for r in shipped), ""]
    if stage.groups:
        out += ["groups (one word sets several options):"]
        out += [f"  {g + '=':<11} {', '.join(options(g, stage))}" for g in stage.groups] + [""]
    out += ["options:", *option_lines(stage.config), "", EXIT_CODES]
    return "\n".join(out)


def option_lines(config: type, prefix: str = "") -> list[str]:
    """Every option of a config with its meaning, those of listed sections too."""
    lines: list[str] = []
    width = max(60, min(110, shutil.get_terminal_size((110, 24)).columns))
    hints = _leaf_hints(config)
    for key, field in known_keys(config).items():
        item = item_class(hints[key])
        allowed = f"a list, default {default_text(field)}" if item else describe_option(hints[key], field)
        lines.append(f"  {prefix}{key}  ({allowed})")
        lines += textwrap.wrap(field.metadata["help"], width, initial_indent="      ", subsequent_indent="      ")
        if item:
            lines += option_lines(item, f"{prefix}{key}[].")
    return lines


def describe_option(hint: object, field: dataclasses.Field[Any]) -> str:
    """Allowed values and default: "number > 0, default 2e-05"."""
    return f"{describe_type(hint, field.metadata['limits'])}, default {default_text(field)}"


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as it would be typed."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is None or isinstance(default, bool):
        return json.dumps(default)
    return str(default)


def _leaf_hints(config: type, prefix: str = "") -> dict[str, object]:
    hints: dict[str, object] = {}
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            hints |= _leaf_hints(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            hints[f"{prefix}{name}"] = hint
    return hints


def completions(words: list[str]) -> list[str]:
    """Candidates for the last word of a command line (the words after `rlhf`)."""
    if len(words) <= 1:
        return [s for s in [*STAGES, "report", "completion", "--help"] if s.startswith(words[0] if words else "")]
    stage = STAGES.get(words[0])
    last = words[-1]
    if stage is None:
        return []
    if "=" not in last:
        found = [f"{k}=" for k in ["conf", *stage.groups, *known_keys(stage.config)]]
        found += ["--help", "--cfg", "--dry-run", "-m"]
        return [f for f in found if f.startswith(last)]
    key, typed = last.split("=", 1)
    hint = _leaf_hints(stage.config).get(key)
    if key == "conf":
        values = [r.name for r in recipes(stage)]
    elif key in stage.groups:
        values = options(key, stage)
    elif hint is bool:
        values = ["true", "false"]
    else:
        values = [str(a) for a in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []
    return [f"{key}={v}" for v in values if v.startswith(typed)]


REPORT_HELP = """\
rlhf report: one HTML page about any runs: chain, curves, responses side by side, time, settings

usage: rlhf report RUN_DIR... [out=FILE.html]

  RUN_DIR        run directories, also of runs that are not finished; or folders that hold some, such as runs/quickstart
  out=FILE.html  where the page is written, default report.html in the working directory
  --help         this page

The page needs no network, no script and no file beside it. What is damaged in a run is named, the rest is shown.

examples:
  rlhf report runs/quickstart
  rlhf report runs/sft runs/ppo runs/raft out=chain.html

exit codes: 0 written, 2 there is no run, or the page cannot be written
"""


BASH_COMPLETION = """\
_rlhf() {
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}") line
    # readline splits words at =; put key, = and value together again
    line="${COMP_LINE:0:COMP_POINT}"; words=($line); words=("${words[@]:1}")
    [[ "$line" == *' ' ]] && words+=("")
    local cur="${words[-1]}" prefix=""
    [[ "$cur" == *=* && "$COMP_WORDBREAKS" == *=* ]] && prefix="${cur%%=*}="
    COMPREPLY=()
    while IFS= read -r line; do COMPREPLY+=("${line#"$prefix"}"); done < <(rlhf __complete "${words[@]}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    [[ ${#COMPREPLY[@]} -eq 0 ]] && compopt -o default
}
complete -F _rlhf rlhf
"""
