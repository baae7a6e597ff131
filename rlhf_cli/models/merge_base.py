"""The model an adapter is merged into: where it is, whether it is the right one, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_cli.errors import ModelError
from rlhf_cli.files import digest_tree
from rlhf_cli.models.adapter import Adapter
from rlhf_cli.models.load import PICKLED, read_config
from rlhf_cli.models.source import check_source, explain_load_error
from rlhf_cli.models.tensor_files import StoredTensor, stored_tensors
from rlhf_cli.models.tokenizer import TOKENIZER_FILES, load_tokenizer
from rlhf_cli.rundir import output_dir, run_of
from rlhf_cli.schema import MergeConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES_FROM_HUB = ("*.json", "*.safetensors", "*.jinja", *TOKENIZER_FILES)
# Another vocabulary shares few numbers with the adapter's; one and the same has at most its reserved tokens renamed.
LARGEST_SHARE_OF_OTHER_TOKENS = 0.05


@dataclass(frozen=True)
class Base:
    """named: path or hub id as it was given; directory: of config and weights; run_dir: the run it is the model of,
    if any; digest: of the directory when it is local; tensors: by their names in the files."""

    named: str
    directory: Path
    run_dir: Path | None
    digest: str | None
    config: PretrainedConfig
    tensors: dict[str, StoredTensor]


def open_base(merge: MergeConfig, adapter: Adapter, download: bool = True) -> Base:
    """Find the adapter's base, check that it is the one it was trained on, and open its weights.

    download: fetch a hub id that is not in the cache yet.
    Raises ModelError: none there, another one than the adapter was trained on, weights that cannot be merged into.
    """
    named = merge.base or _named_by(adapter)
    revision = merge.base_revision or (None if merge.base else adapter.settings.get("revision"))
    directory, run_dir = _locate(named, revision, download, merge.trust_remote_code)
    local = Path(named).expanduser().is_dir()
    digest = digest_tree(directory) if local else None
    _check_digest(adapter, named, digest)
    config = read_config(directory, trust_remote_code=merge.trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"merge.base: {named} is quantised (quantization_config in its config.json); adapters are merged into the"
            " unquantised model that it was made of: name that one with merge.base="
        )
    return Base(named, directory, run_dir, digest, config, dict(_open_files(directory, named)))


def check_vocabulary(base: Base, adapter: Adapter, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool) -> None:
    """Raise ModelError when a base that only the user vouches for has another vocabulary than the adapter's tokenizer.

    A base whose digest fits, or that the adapter itself names, may have been trained with another tokenizer on purpose.
    """
    vouched = recorded_digest(adapter) is not None and base.digest is not None
    if vouched or base.named in _candidates(adapter) or not has_tokenizer(base.directory):
        return
    theirs = load_tokenizer(base.directory, trust_remote_code=trust_remote_code).get_vocab()
    ours = tokenizer.get_vocab()
    other = sum(ours.get(token) != number for token, number in theirs.items())
    if other > LARGEST_SHARE_OF_OTHER_TOKENS * len(theirs):
        raise ModelError(
            f"merge.base: {base.named} has another vocabulary than the adapter: {other} of its {len(theirs)} tokens"
            f" have other numbers in {adapter.folder}, or none; name the model that the adapter was trained on"
        )


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds tokenizer files."""
    return any(f for pattern in TOKENIZER_FILES for f in directory.glob(pattern))


def recorded_digest(adapter: Adapter) -> str | None:
    """The digest of the model that the adapter's run was started from, where it could be taken."""
    parents = adapter.manifest.get("parents") or []
    of_parent = next((p.get("digest") for p in parents if p.get("role") in ("policy", "reward")), None)
    return adapter.manifest.get("base_digest") or of_parent


def _candidates(adapter: Adapter) -> list[str]:
    parents = adapter.manifest.get("parents") or []
    runs = [p["run_dir"] for p in parents if p.get("role") in ("policy", "reward")]
    named = [adapter.manifest.get("base_model"), *runs, adapter.settings.get("base_model_name_or_path")]
    return [name for name in named if name]


def _named_by(adapter: Adapter) -> str:
    """The base that the adapter speaks of: what is a directory here, else what may be a hub id."""
    candidates = _candidates(adapter)
    if not candidates:
        raise ModelError(f"merge.base is required: {adapter.folder} does not say which model it belongs to")
    return next((name for name in candidates if Path(name).expanduser().is_dir()), candidates[-1])


def _locate(named: str, revision: str | None, download: bool, code: bool) -> tuple[Path, Path | None]:
    """(directory with config.json, run directory or None)."""
    place = Path(named).expanduser()
    if not place.is_dir():
        try:
            check_source(named, "merge.base")
        except ModelError as error:
            raise ModelError(f"{error}; the adapter was trained on it: set merge.base= to where it is now") from None
        return _from_hub(named, revision, download, code), None
    run_dir = run_of(place)
    if run_dir is not None:
        advice = "; an adapter is merged into a plain model: finish that run, or merge it first"
        return output_dir(run_dir, ("policy", "reward"), f"merge.base: {named}", advice), run_dir
    if not (place / "config.json").is_file():
        raise ModelError(f"merge.base: {named} is neither a run directory (manifest.json) nor a model (config.json)")
    return place, None


def _from_hub(named: str, revision: str | None, download: bool, code: bool) -> Path:
    patterns = [*FILES_FROM_HUB, *(["*.py"] if code else [])]
    try:
        return Path(
            snapshot_download(
                named,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],  # the same weights in another layout
                local_files_only=not download,
            )
        )
    except LocalEntryNotFoundError as error:
        if not download:
            raise ModelError(
                f"merge.base: {named} is not in the local cache, and a dry run downloads nothing;"
                f" fetch it (hf download {named}) or start the merge itself"
            ) from None
        raise explain_load_error(error, named, "base") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise explain_load_error(error, named, "base") from error


def _check_digest(adapter: Adapter, named: str, digest: str | None) -> None:
    expected = recorded_digest(adapter)
    if expected and digest and digest != expected:
        raise ModelError(
            f"merge.base: {named} is not the model that {adapter.given} was trained on, or has changed since"
            f" (digest {digest[:12]}, the run began from {expected[:12]}); name the very directory with merge.base="
        )


def _open_files(directory: Path, named: str) -> Iterator[tuple[str, StoredTensor]]:
    """All tensors, file by file."""
    if (directory / INDEX).is_file():
        try:
            files = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"merge.base: {directory / INDEX} is damaged ({error!r})") from None
    elif (directory / SINGLE).is_file():
        files = dict.fromkeys(stored_tensors(directory / SINGLE), SINGLE)
    else:
        pickled = sorted(p.name for pattern in PICKLED for p in directory.glob(pattern))
        what = f"pickled weights only ({pickled[0]})" if pickled else "no weights"
        raise ModelError(f"merge.base: {named} has {what}; needed is {SINGLE}, or shards with {INDEX}")
    for file in dict.fromkeys(files.values()):
        if not (directory / file).is_file():
            raise ModelError(f"merge.base: {named} is incomplete: {file} is named in {INDEX} and not there")
        for name, tensor in stored_tensors(directory / file).items():
            if files.get(name) == file:
                yield name, tensor
