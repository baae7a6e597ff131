"""A LoRA adapter in PEFT's layout as data: what it changes in which tensor. Nothing of the base is needed to read it.

Only what can be merged exactly is read; everything else that PEFT can do is refused by name, and so is every tensor
that has no known place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_cli.errors import ModelError
from rlhf_cli.models.tensor_files import StoredTensor, in_memory, stored_tensors
from rlhf_cli.rundir import output_dir, read_manifest, run_of

Task = Literal["causal_lm", "sequence_classification"]
TASKS: dict[str | None, Task | None] = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_CLS": "sequence_classification",
    None: None,  # PEFT lets one leave it out; then the base decides
}
CONFIG, SAFE, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # PeftModel.base_model is the tuner, whose .model is the transformers model
PEFT_DEFAULT = 8  # of r and of lora_alpha
FACTOR = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?")

# Settings of PEFT 0.21's LoraConfig. First those that change what W + scale·B·A means, with what they are.
REFUSED = {
    "use_dora": "DoRA, which rescales whole columns of the weight",
    "lora_bias": "a bias in the adapter",
    "target_parameters": "adapters of bare parameters, such as fused experts",
    "trainable_token_indices": "single trained rows of the embeddings",
    "layer_replication": "layers that are used several times",
    "alora_invocation_tokens": "an adapter that only works after certain tokens",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "a router between adapters",
    "kasa_config": "KaSA, which changes the base",
    "monteclora_config": "MonteCLoRA, which samples",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron's split layers",
}
# Those that say where adapters are, how they started or were trained. The weights tell all that matters of it.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern",
    "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Ways to start that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract their start from it.
PLAIN_STARTS = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LowRank:
    """scale · B·A of one module. a (r, in), b (out, r); an embedding's `in` are its tokens."""

    a: StoredTensor
    b: StoredTensor
    scale: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        """r"""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    given: as the user named it; folder: of the weights; manifest: of its run, or {}; settings: adapter_config.json;
    low_rank: by module name; whole: tensors that replace the base's, by name. Names as in the model it was trained on.
    """

    given: str
    folder: Path
    manifest: dict[str, Any]
    settings: dict[str, Any]
    task: Task | None
    low_rank: dict[str, LowRank]
    whole: dict[str, StoredTensor]

    @property
    def ties_embeddings(self) -> bool:
        """Whether PEFT was told to train tied embeddings and head as one."""
        return bool(self.settings.get("ensure_weight_tying"))

    def is_copy(self, name: str) -> bool:
        """Whether a tensor in `whole` belongs to a trained copy of its module, beside which the original is kept (for
        whatever is tied to it)."""
        module = name.rpartition(".")[0]
        return any(module == m or module.endswith(f".{m}") for m in self.settings.get("modules_to_save") or [])


def read_adapter(given: str, allow_pickle: bool = False) -> Adapter:
    """The adapter of a LoRA run, or of a folder in PEFT's layout.

    allow_pickle: read adapter_model.bin when there is nothing else, tensors only.
    Raises ModelError: no (finished) adapter, damaged files, or an adapter that cannot be merged exactly.
    """
    folder, manifest = locate_adapter(given)
    settings = _read_settings(folder)
    check_settings(settings, folder)
    task = manifest["output"].get("task") if manifest else TASKS[settings.get("task_type")]
    low_rank, whole = _sort(_read_weights(folder, allow_pickle), settings, folder)
    return Adapter(given, folder, manifest, settings, task, low_rank, whole)


def locate_adapter(given: str) -> tuple[Path, dict[str, Any]]:
    """(folder with adapter_config.json, manifest or {}). Raises ModelError when there is no finished adapter."""
    place = Path(given).expanduser()
    if not place.is_dir():
        raise ModelError(
            f"merge.adapter: no such directory: {given}; name a run directory of a LoRA run or PEFT's folder"
        )
    run_dir = run_of(place)
    if run_dir is not None:
        advice = "; give it a finished run with lora.enabled=true"
        return output_dir(run_dir, ("adapter",), f"merge.adapter: {given}", advice), read_manifest(run_dir)
    if not (place / CONFIG).is_file():
        raise ModelError(f"merge.adapter: {given} has no {CONFIG}; allowed: a run of LoRA, or PEFT's folder")
    return place, {}


def check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError for whatever W + scale·B·A does not say."""
    where = f"merge.adapter: {folder / CONFIG}"
    advice = "merge it with PEFT itself (merge_and_unload), which knows what it means"
    if settings.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {settings.get('peft_type')!r}, only LORA can be merged here; {advice}")
    if settings.get("task_type") not in TASKS:
        raise ModelError(
            f"{where}: task_type is {settings['task_type']!r}; allowed: CAUSAL_LM (a policy), SEQ_CLS (a reward model)"
        )
    for key, what in REFUSED.items():
        if settings.get(key):
            raise ModelError(f"{where}: {key} is set ({what}), which is more than W + scale·B·A; {advice}")
    if settings.get("bias", "none") != "none":
        raise ModelError(
            f"{where}: bias is {settings['bias']!r}: trained biases of the base cannot be merged; {advice}"
        )
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ModelError(
            f"{where}: init_lora_weights is {start!r}, which changes the base when training starts, so that the"
            " adapter does not fit the base on disk; save it again with PEFT's save_pretrained("
            "..., path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"
        )
    for key in sorted(set(settings) - set(REFUSED) - HARMLESS):
        if settings[key]:
            raise ModelError(f"{where}: {key}={settings[key]!r} is a setting this version does not know; {advice}")


def scale_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r with rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732).

    alpha_pattern's keys are regular expressions for the end of a module's name; the first that fits counts.
    """
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", PEFT_DEFAULT))
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"merge.adapter: {path} is damaged ({error}); save the adapter again") from None
    return settings


def _read_weights(folder: Path, allow_pickle: bool) -> dict[str, StoredTensor]:
    if (folder / SAFE).is_file():
        return stored_tensors(folder / SAFE)
    pickled = folder / PICKLED
    if not pickled.is_file():
        raise ModelError(f"merge.adapter: {folder} has no weights ({SAFE})")
    if not allow_pickle:
        raise ModelError(
            f"merge.adapter: {folder} has pickled weights only ({PICKLED}), which can run code when they are read;"
            " if you trust their source, set merge.allow_pickle=true (tensors only are read)"
        )
    try:
        loaded = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or malicious pickle raises
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"merge.adapter: {pickled} holds more than tensors, or is damaged: {reason}") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ModelError(f"merge.adapter: {pickled} is no dictionary of tensors; save the adapter again")
    return in_memory(loaded)


def _sort(
    weights: dict[str, StoredTensor], settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, LowRank], dict[str, StoredTensor]]:
    """What each tensor is, from its name; pairs are put together."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    embeddings: set[str] = set()
    whole: dict[str, StoredTensor] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(PREFIX)
        if name == key or ".lora_magnitude" in name or re.search(r"\.lora_[AB]\.bias$", name):
            raise ModelError(f"merge.adapter: {folder} holds {key}, which is no part of a plain LoRA adapter")
        found = FACTOR.fullmatch(name)
        if found:
            factors.setdefault(found["module"], {})[found["side"]] = tensor
            if found["kind"]:
                embeddings.add(found["module"])
        elif ".lora_" in name:
            raise ModelError(f"merge.adapter: {folder} holds {key}, which is no part of a plain LoRA adapter")
        else:  # old versions of PEFT left a word in the names of copies, new ones in those of wrapped layers
            whole[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = tensor
    low_rank = {
        module: _pair(module, sides, settings, module in embeddings, folder) for module, sides in factors.items()
    }
    if not low_rank:
        raise ModelError(
            f"merge.adapter: {folder} holds no adapter weights (lora_A, lora_B); it was saved empty, as happens when"
            " sharded weights are not gathered: save it again from the training run"
        )
    return low_rank, whole


def _pair(
    module: str, sides: dict[str, StoredTensor], settings: Mapping[str, Any], is_embedding: bool, folder: Path
) -> LowRank:
    where = f"merge.adapter: {folder}: {module}"
    if set(sides) != {"A", "B"}:
        raise ModelError(f"{where}: has lora_{next(iter(sides))} without its partner; the file is incomplete")
    a, b = sides["A"], sides["B"]
    rank = _by_pattern(settings.get("rank_pattern"), module, settings.get("r", PEFT_DEFAULT))
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ModelError(f"{where}: factors of shapes {a.shape} and {b.shape}; only those of linear layers and"
                         " embeddings can be merged, not those of convolutions")  # fmt: skip
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ModelError(
            f"{where}: lora_A {a.shape} and lora_B {b.shape} do not have the rank {rank} that {CONFIG} says;"
            " config and weights are not of one adapter"
        )
    return LowRank(a, b, scale_of(settings, module, rank), is_embedding)
