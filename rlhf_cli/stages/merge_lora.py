"""`rlhf merge-lora`: an adapter and its base become a plain model, policy or reward model.

merge reads top to bottom: open and match, write aside, compare, publish, tell.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.errors import RunFailed
from rlhf_cli.files import check_space, digest_tree, directory_aside
from rlhf_cli.models.adapter import Adapter, read_adapter
from rlhf_cli.models.merge import open_tokenizer, parse_size, split_shards, write_beside, write_weights
from rlhf_cli.models.merge_base import Base, check_vocabulary, open_base
from rlhf_cli.models.merge_plan import MergePlan, plan_merge
from rlhf_cli.models.merge_verify import Verification, available_memory, memory_needed, verify
from rlhf_cli.rundir import read_manifest, run_of, update_manifest
from rlhf_cli.runtime import manifest
from rlhf_cli.runtime.peak_memory import peak_memory_gb
from rlhf_cli.runtime.process import RankProcess
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import MergeConfig, MergeLoraConfig, to_dict

MIB = 2**20


class Parts(NamedTuple):
    """What is merged, and the plan of it. tokenizer: the one the merged model gets."""

    adapter: Adapter
    base: Base
    tokenizer: PreTrainedTokenizerBase
    plan: MergePlan


def run(config: MergeLoraConfig, run_dir: Path, process: RankProcess) -> None:
    """The stage, in one process. A stop ends it at once: there is nothing half-done to save."""
    manifest.begin(run_dir, config.stage, to_dict(config), process.world_size)
    merge(config.merge, run_dir, Display(process.terminal, config.logging.progress, config.stage))


def dry_run(config: MergeLoraConfig, world_size: int) -> None:
    """Match base and adapter and print what would be merged. Nothing is written, weights are not read."""
    parts = open_parts(config.merge, download=False)
    title = "rlhf merge-lora --dry-run: nothing was started"
    Display(sys.stdout, "none", config.stage).table(title, describe(parts, config.merge))


def merge(config: MergeConfig, run_dir: Path, display: Display) -> dict[str, float]:
    """Merge into RUN_DIR/model. Returns the final figures, which are also in the manifest."""
    started = time.monotonic()
    parts = open_parts(config)
    record_origin(parts, run_dir)
    tell_plan(parts, display)
    final = run_dir / "model"
    check_space(run_dir, parts.plan.nbytes, "the merged model")
    with directory_aside(final) as aside:
        shards = write_model(parts, config, aside, display)
        peak = peak_memory_gb(torch.device("cpu"))
        figures = {"seconds": round(time.monotonic() - started, 3), "perf/peak_memory_gb": peak}
        checked = compare(parts, config, aside, display)
    figures |= {"tensors_merged": float(parts.plan.num_changed), "shards": float(shards)}
    if isinstance(checked, Verification):
        figures["max_abs_difference"] = checked.max_abs_difference
        verification: dict[str, Any] = checked._asdict()
    else:
        verification = {"skipped": checked}
    finish(parts, figures, verification, run_dir, display)
    return figures


def open_parts(config: MergeConfig, download: bool = True) -> Parts:
    """Adapter, base and tokenizer, matched. download: a base on the hub may be fetched.

    Raises ModelError for whatever does not fit, before anything is written.
    """
    adapter = read_adapter(str(config.adapter), config.allow_pickle)
    base = open_base(config, adapter, download)
    tokenizer, own = open_tokenizer(adapter, base, config.trust_remote_code)
    if own:
        check_vocabulary(base, adapter, tokenizer, config.trust_remote_code)
    plan = plan_merge(adapter, base, len(tokenizer) if own else None, config.output_dtype, config.trust_remote_code)
    return Parts(adapter, base, tokenizer, plan)


def record_origin(parts: Parts, run_dir: Path) -> None:
    """What the model is made of and what it takes over, into the manifest."""
    adapter, base = parts.adapter, parts.base
    adapter_run = run_of(adapter.folder)
    local = base.directory if base.digest else None
    origin = [
        parent("adapter", adapter_run, adapter.folder, digest_tree(adapter.folder)),
        parent("base", base.run_dir, local or base.named, base.digest),
    ]
    update_manifest(
        run_dir, base_model=base.named, base_digest=base.digest, parents=origin, template=template_name(parts),
        reward=adapter.manifest.get("reward"),
    )  # fmt: skip


def parent(role: str, run_dir: Path | None, path: Path | str, digest: str | None) -> dict[str, str | None]:
    """The manifest's entry for something the model is made of: a run, a directory, or a hub id."""
    if run_dir is not None:
        return {"role": role, "run_dir": str(run_dir.resolve()), "digest": digest}
    return {"role": role, "path": str(path.resolve() if isinstance(path, Path) else path), "digest": digest}


def template_name(parts: Parts) -> str | None:
    """The template that the adapter was trained with, else the base's."""
    of_base = read_manifest(parts.base.run_dir).get("template") if parts.base.run_dir else None
    return parts.adapter.manifest.get("template") or of_base


def write_model(parts: Parts, config: MergeConfig, directory: Path, display: Display) -> int:
    """Everything that belongs to the model. Returns the number of shards."""
    plan = parts.plan
    display.start(0, max(1, plan.nbytes // MIB), "MiB")
    shown = -1

    def progress(done: int) -> None:
        nonlocal shown
        if done // MIB > shown:
            shown = done // MIB
            display.step(shown, {"written": f"{done / 1e9:.2f} GB"})

    try:
        shards = write_weights(plan, directory, parse_size(config.max_shard_size), progress)
    finally:
        display.stop()
    template = TEMPLATES.get(template_name(parts) or "")
    write_beside(plan, parts.base, parts.tokenizer, directory, template.stop[0] if template and template.stop else None)
    return shards


def compare(parts: Parts, config: MergeConfig, directory: Path, display: Display) -> Verification | str:
    """The merged model beside base + adapter, or why not. Raises RunFailed when they differ by more than rounding."""
    needed, available = memory_needed(parts.plan), available_memory()
    if config.verify == "never":
        return "merge.verify=never"
    if config.verify == "auto" and needed > available:
        reason = f"two models take {needed / 1e9:.1f} GB, available are {available / 1e9:.1f} GB"
        display.say(f"not compared with base + adapter: {reason}; merge.verify=always tries it all the same")
        return reason
    display.say("comparing with base + adapter")
    found = verify(parts.plan, parts.adapter, parts.base, directory, trust_remote_code=config.trust_remote_code)
    if not found.is_rounding(parts.plan.config.dtype):
        raise RunFailed(
            f"the merged model differs from base + adapter by {found.max_abs_difference:.3g} where the largest logit is"
            f" {found.max_logit:.3g}: that is no rounding. It is not published; what was written lies in {directory}."
            " Merge with PEFT (merge_and_unload), and please report the model's type"
        )
    return found


def finish(
    parts: Parts, figures: dict[str, float], verification: dict[str, Any], run_dir: Path, display: Display
) -> None:
    """The last word: summary and manifest."""
    plan = parts.plan
    rows = [(name, f"{value:,.6g}") for name, value in figures.items()]
    display.table("rlhf merge-lora", [*rows, ("model", str(run_dir / "model"))])
    kind = "policy" if plan.task == "causal_lm" else "reward"
    output = {"kind": kind, "task": plan.task, "path": "model", "format": "hf"}
    update_manifest(run_dir, status="complete", output=output, metrics=figures, verification=verification)


def tell_plan(parts: Parts, display: Display) -> None:
    """What the user should know about this merge."""
    plan = parts.plan
    display.say(
        f"{parts.adapter.given} into {parts.base.named}: {plan.num_changed} of {len(plan.targets)} tensors change,"
        f" {plan.config.architectures[0]}, {short_dtype(plan)}, {plan.nbytes / 1e9:.2f} GB"
    )
    if plan.rows != plan.base_rows:
        display.say(f"embeddings: {plan.base_rows} rows become {plan.rows}")
    if plan.untied:
        display.say("embeddings and head were one tensor; the adapter changes them differently, so they are two now")
    if plan.dropped:
        names = ", ".join(plan.dropped[:3]) + (" ..." if len(plan.dropped) > 3 else "")
        display.say(f"left out, since a {plan.config.architectures[0]} has no place for them: {names}")
    if plan.through_transformers:
        display.say("the base is stored in another form than the adapter speaks of: it is loaded whole, not by pieces")


def describe(parts: Parts, config: MergeConfig) -> list[tuple[str, str]]:
    """The table of a dry run."""
    adapter, plan = parts.adapter, parts.plan
    ranks = sorted({pair.rank for pair in adapter.low_rank.values()})
    scales = sorted({round(pair.scale, 6) for pair in adapter.low_rank.values()})
    shards = split_shards(plan.targets, parse_size(config.max_shard_size))
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    needed, available = memory_needed(plan), available_memory()
    compared = config.verify == "always" or (config.verify == "auto" and needed <= available)
    return [
        ("adapter", f"{adapter.folder}: rank {listed(ranks)}, scale {listed(scales)}"),
        ("base", f"{parts.base.named}: {plan.base_rows} rows of embeddings"),
        ("becomes", f"{plan.config.architectures[0]} with {plan.rows} rows, template {template_name(parts)}"),
        ("tensors", f"{len(plan.targets)}, of which {plan.num_changed} change, {len(adapter.whole)} brought whole"),
        ("written", f"{plan.nbytes / 1e9:.3f} GB in {files}, {short_dtype(plan)}"),
        ("compared", f"{'yes' if compared else 'no'}: takes {needed / 1e9:.1f} GB, available {available / 1e9:.1f} GB"),
    ]


def listed(values: list[Any]) -> str:
    """Numbers in a row."""
    return ", ".join(f"{value:g}" for value in values)


def short_dtype(plan: MergePlan) -> str:
    """The precision of most weights."""
    return str(plan.config.dtype).removeprefix("torch.")
