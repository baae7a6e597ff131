"""What policy and reference start from, and whether other models fit them: found and checked before any weights are
loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_cli.assemble import Text
from rlhf_cli.data.templates import resolve_template
from rlhf_cli.errors import ModelError
from rlhf_cli.files import digest_tree
from rlhf_cli.models.load import read_config
from rlhf_cli.models.tokenizer import ensure_pad, load_tokenizer, tokenizer_digest
from rlhf_cli.reward.locate import Located
from rlhf_cli.rundir import read_manifest, run_of
from rlhf_cli.runtime.manifest import model_dir
from rlhf_cli.schema import AlignedConfig, RewardSourceConfig


class Origins(NamedTuple):
    """Directories or hub ids. reference: None = the policy's own weights without its adapter."""

    policy: str
    reference: str | None


def find_origins(config: AlignedConfig, text: Text | None) -> Origins:
    """text: the policy's, which others must agree with; None to leave that out (a dry run has configs only).

    Raises ModelError for a model that is missing, of another kind, or whose tokenizer or template is another one.
    """
    assert config.model.path is not None, "checked by the schema"
    policy = model_dir(config.model.path)[0]
    reference, wanted = None if config.lora.enabled else policy, config.algorithm.ref
    if wanted is not None:
        reference = model_dir(wanted)[0]
        if text is not None:
            differs = other_text(text, reference, None, config.model.trust_remote_code)
            if differs:
                raise ModelError(f"{config.stage}.ref: {wanted} {differs}; KL compares the two token by token")
    return Origins(policy, reference)


def check_base(found: Located, key: str, stage: str, policy: str, policy_digest: str | None) -> None:
    """Raise ModelError unless a reward adapter was trained on the policy's very weights (sharing: hydra).

    policy: directory or hub id; policy_digest: of that directory, None for a hub id.
    """
    assert found.base is not None
    base, ours = Path(found.base).expanduser(), Path(policy).expanduser()
    if not base.is_dir() or not ours.is_dir():
        same = found.base == policy
    elif found.base_digest is not None:
        same = found.base_digest == policy_digest
    else:
        same = base.resolve() == ours.resolve() or digest_tree(base) == policy_digest
    if not same:
        raise ModelError(
            f"{key}.path: {found.path} is an adapter of {found.base}, but {stage}.sharing=hydra needs one that was"
            f" trained on the policy's own weights, {policy} as it is now: train it there (`rlhf rm` from that model"
            f" with lora=r16), or merge it (rlhf merge-lora) and use {stage}.sharing=separate"
        )


def other_text(text: Text, path: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """What is wrong with tokenizer or template of a model that will read the policy's tokens; None = they are the same,
    as far as is known: a model without its run does not tell its template."""
    try:
        theirs = load_tokenizer(path, revision, trust_remote_code)
        stored = _stored_template(path)
        template = resolve_template("auto", stored, theirs) if stored is not None else text.template
    except ModelError as error:
        return f"has no tokenizer that could be compared ({error})"
    if _digest(theirs) != _digest(text.tokenizer):
        return "has another tokenizer than the policy"
    if template.jinja != text.template.jinja:
        ours = text.template.name
        return (
            f"was trained with the template {template.name}, and the policy writes {ours}: run the stage that made"
            f" it with the template {ours} first"
        )
    return None


def _stored_template(path: str) -> str | None:
    folder = Path(path).expanduser()
    run_dir = run_of(folder) if folder.is_dir() else None
    found: str | None = read_manifest(run_dir).get("template") if run_dir is not None else None
    return found


def _digest(tokenizer: PreTrainedTokenizerBase) -> str:
    own = copy.deepcopy(tokenizer)
    ensure_pad(own)
    return tokenizer_digest(own)


def source_config(source: RewardSourceConfig, found: Located) -> Any:
    """The transformers config of a reward model; of an adapter that of its base."""
    return read_config(found.base or found.path, source.revision, source.trust_remote_code)
