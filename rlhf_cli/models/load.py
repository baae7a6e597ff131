"""Pretrained models: configuration, weights, precision, resized embeddings."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_cli.errors import ModelError
from rlhf_cli.models.source import check_source, explain_load_error
from rlhf_cli.schema import LoadedModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
CLASSIFIER = "ForSequenceClassification"
OTHER_TASKS = (
    CLASSIFIER,
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForSeq2SeqLM",
)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_dtype(name: Literal["auto", "bf16", "fp32", "fp16"], device: torch.device) -> torch.dtype:
    """model.dtype as torch has it. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on CPU."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_config(path: Path | str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a causal LM, without weights. Raises ModelError when it is none."""
    config = read_config(path, revision, trust_remote_code)
    check_causal_lm(config, path)
    return config


def read_config(path: Path | str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of any model, without weights. Raises ModelError when there is none."""
    check_source(path, "model.path")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(path), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise explain_load_error(error, path, "config") from error
    return config


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the config is that of a reward model or classifier."""
    return any(name.endswith(CLASSIFIER) for name in config.architectures or [])


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' Auto class of a config: sequence classifier or causal LM."""
    return AutoModelForSequenceClassification if is_classifier(config) else AutoModelForCausalLM


def load_policy(
    model: LoadedModelConfig,
    path: Path | str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    num_tokens: int | None = None,
) -> PreTrainedModel:
    """A causal LM with the weights of `path`, in `dtype` from the start, on CPU (quantised: on `device`).

    It is loaded in its dtype and not cast afterwards, since a cast would round the rotary frequencies too.
    num_tokens: len(tokenizer); a smaller embedding matrix grows to it, a larger (padded) one stays.
    Raises ModelError: no such path, no causal LM, weights that are pickled, incomplete, or of other shapes.
    """
    config = load_config(path, model.revision, model.trust_remote_code)
    policy, report = load_weights(config, model, path, dtype, device)
    check_complete(report["missing_keys"], path)
    if num_tokens is not None:
        grow_embeddings(policy, num_tokens)
    policy.config.use_cache = False
    return policy


def load_weights(
    config: PretrainedConfig,
    model: LoadedModelConfig,
    path: Path | str,
    dtype: torch.dtype,
    device: torch.device | None,
    full_precision: list[str] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that `config` describes with the weights of `path`, and transformers' report on missing and unexpected
    names. full_precision: modules that nf4 leaves alone (None: the output head)."""
    auto = auto_class(config)
    if Path(path).expanduser().is_dir():
        _check_safetensors(Path(path).expanduser())
    options = _quantization(dtype, device, full_precision) if model.quantization == "nf4" else {}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    try:
        loaded, report = auto.from_pretrained(
            str(path),
            config=config,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise explain_load_error(error, path, "model") from error
    return loaded, report


def check_complete(missing: Collection[str], path: Path | str) -> None:
    """Raise ModelError when tensors were missing from the weights."""
    if missing:
        names = sorted(missing)
        raise ModelError(
            f"{path}: the weights lack {len(names)} of the model's tensors ({', '.join(names[:3])} ...);"
            " they would be random. Is it an adapter (run rlhf merge-lora), or another kind of model?"
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the blocks' activations in the backward. Call on the plain model, before or after adding adapters.

    Not the re-entrant kind, so frozen embeddings in front of trained adapters need no detour.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"model.gradient_checkpointing: {type(model).__name__} has none; set it to false")
    # transformers 5.20, the last one for Python 3.10, knows it by its older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def grow_embeddings(model: PreTrainedModel, num_tokens: int) -> int:
    """Add rows to embeddings and head until there is one per token; returns how many. Never removes rows.

    A new row is the mean of the old ones (Hewitt 2021, "Initializing new word embeddings"): the new token starts no
    likelier than the average one, and the same numbers come out wherever the same model grows.
    """
    embeddings = model.get_input_embeddings()
    old = embeddings.num_embeddings
    if num_tokens <= old:
        return 0
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    layers = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    tensors = {id(t): t for m in layers.values() for t in (m.weight, getattr(m, "bias", None)) if t is not None}
    for tensor in tensors.values():
        # Also after a sharded load: transformers leaves a grown matrix whole, with the old rows on rank 0 only, and
        # the engine sends it on to the others.
        assert tensor.shape[0] == num_tokens
        with torch.no_grad():
            tensor[old:] = tensor[:old].float().mean(0).to(tensor.dtype)
    return num_tokens - old


def check_causal_lm(config: PretrainedConfig, path: Path | str) -> None:
    """Raise ModelError unless transformers has a causal LM for the config, and the weights are not another task's."""
    names = config.architectures or []
    other = [n for n in names if n.endswith(OTHER_TASKS)]
    if other:
        hint = " (a reward model or classifier)" if other[0].endswith(CLASSIFIER) else ""
        raise ModelError(f"model.path: {path} is a {other[0]}{hint}, not a causal language model (...ForCausalLM)")
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not custom and (config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder):
        raise ModelError(f"model.path: {path} is of type {config.model_type}, which has no causal language model")


def _check_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        if (directory / "adapter_config.json").exists() and not (directory / "model.safetensors").exists():
            base = json.loads((directory / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise ModelError(
                f"model.path: {directory} holds a LoRA adapter of {base}, not a model; run rlhf merge-lora first"
            )
        return
    pickled = sorted(p.name for pattern in PICKLED for p in directory.glob(pattern))
    if pickled:
        raise ModelError(
            f"model.path: {directory} has pickled weights only ({pickled[0]}), which can run code when they are read;"
            " convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise ModelError(f"model.path: {directory} has a config but no weights (*.safetensors)")


def _quantization(dtype: torch.dtype, device: torch.device | None, full_precision: list[str] | None) -> dict[str, Any]:
    """from_pretrained's options for QLoRA: nf4 with double quantisation (Dettmers et al., arXiv 2305.14314)."""
    if device is None or device.type != "cuda":
        raise ModelError("model.quantization: nf4 runs on CUDA GPUs only; use model.quantization=none on this machine")
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ModelError("model.quantization: nf4 needs bitsandbytes; pip install 'rlhf-cli[qlora]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=full_precision,  # read for 4 bits too, whatever it is called
    )
    return {"quantization_config": config, "device_map": {"": device}}
