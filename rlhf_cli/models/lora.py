"""Low-rank adapters through PEFT. What we rely on beyond PEFT's documented interface stands here, with canary tests."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import ModelError
from rlhf_cli.files import directory_aside
from rlhf_cli.schema import LoraConfig

ALL_LINEAR = "all-linear"
TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]


def plain_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT one (its adapters stay in place), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def wrapped_copies(module: nn.Module) -> list[nn.Module]:
    """The modules that may do the work of `module`: the original and PEFT's trained copies, or the module alone."""
    if not isinstance(module, AuxiliaryTrainingWrapper):
        return [module]
    copies = getattr(module, "modules_to_save", None)
    if copies is None:  # trained tokens: the wrapper itself computes
        return [module]
    return [module.original_module, *copies.values()]


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Full names of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return [n for n in _candidates(model) if model.get_submodule(n) is not head]


def _candidates(model: PreTrainedModel) -> list[str]:
    # The score head starts at random and is trained in full beside the adapter.
    score = getattr(model, "score", None)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not score]


def lora_targets(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Full names of the modules that lora.target_modules means: all-linear, names (or ends of names), or a pattern.

    Raises ModelError for a name that fits no linear layer.
    """
    wanted = lora.target_modules
    linear = linear_modules(model)
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return linear
    # The output head may be named, it is only never meant by all-linear.
    candidates = _candidates(model)
    targets: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        fits = [c for c in candidates if c == name or c.endswith(f".{name}") or _matches(name, c)]
        if not fits:
            short = sorted({c.rsplit(".", 1)[-1] for c in candidates})
            raise ModelError(
                f"lora.target_modules: {name!r} is no linear layer of {type(model).__name__};"
                f" allowed: {ALL_LINEAR}, {', '.join(short)}, or longer ends of names such as {linear[0]}"
            )
        targets.update(fits)
    return [c for c in candidates if c in targets]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # then it is no pattern, and the caller reports the name


def add_lora(
    model: PreTrainedModel,
    lora: LoraConfig,
    task_type: TaskType = "CAUSAL_LM",
    train_embeddings: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Wrap `model` with a trainable adapter; everything else is frozen. The adapter starts as the identity.

    task_type SEQ_CLS: PEFT trains a copy of the head `score` in full, and saves it with the adapter.
    train_embeddings: embeddings and head are trained in full and saved with the adapter, for new tokens that must be
    learnt. A pad token alone needs none of it: no position looks at it, and its row is made again from the others.
    The adapter has the model's dtype, since the engine keeps fp32 masters itself.
    """
    targets = lora_targets(model, lora)
    modules = dict(model.named_modules())
    config = PeftLoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=_shortest_names(model, targets),
        fan_in_fan_out=all(isinstance(modules[t], Conv1D) for t in targets),
        modules_to_save=_embedding_names(model) if train_embeddings else None,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # see _tie_trained_copies
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every rank's GPU alike
        wrapped = cast(PeftModel, get_peft_model(cast(Any, model), config, autocast_adapter_dtype=False))
    if train_embeddings and model.config.tie_word_embeddings:
        _tie_trained_copies(wrapped)
    return wrapped


def load_adapter(base: PreTrainedModel, folder: Path | str, trainable: bool = False) -> PeftModel:
    """Wrap `base` with the adapter in a folder of PEFT's layout; trainable: to go on with its training.

    Everything else of `base` is frozen. Raises ModelError when the adapter is not one of such a model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(
                base, str(folder), is_trainable=trainable, autocast_adapter_dtype=False, torch_device="cpu"
            )
    except (RuntimeError, ValueError, UserWarning) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"the adapter {folder} does not fit its base: {first}") from error
    return wrapped


def save_adapter(
    model: PeftModel,
    state_dict: dict[str, Tensor],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    base_path: str,
    chat_template: str | None = None,
) -> None:
    """Write the adapter in PEFT's layout, complete or not at all.

    state_dict: at least the trained parameters on CPU, by the names they have in `model` (whose own weights are not
    read, they may be sharded). base_path: what the adapter belongs to.
    """
    weights = get_peft_model_state_dict(cast(Any, model), state_dict=state_dict, save_embedding_layers=False)
    config = model.peft_config["default"]
    missing = [n for n, p in model.named_parameters() if p.requires_grad and n not in state_dict]
    assert not missing, f"trained parameters that were not gathered: {missing[:3]}"
    assert all(t.numel() for t in weights.values()), "sharded parameters reached save_adapter"
    with directory_aside(directory) as aside:
        save_file(_apart(weights), aside / "adapter_model.safetensors", {"format": "pt"})
        before = config.base_model_name_or_path, config.inference_mode
        config.base_model_name_or_path, config.inference_mode = base_path, True
        config.save_pretrained(str(aside))
        config.base_model_name_or_path, config.inference_mode = before
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(aside)


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied embeddings and head are one tensor, which the file format wants twice: PEFT asks for both names."""
    pointers = [t.data_ptr() for t in weights.values()]
    return {k: v.clone() if pointers.count(v.data_ptr()) > 1 else v.contiguous() for k, v in weights.items()}


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of input embeddings and, where there is one, output head."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    names = {id(m): n for n, m in model.named_modules()}
    return [names[id(m)].rsplit(".", 1)[-1] for m in modules]


def _tie_trained_copies(model: PeftModel) -> None:
    """Make the trained copies of embeddings and head one parameter again. PEFT's ensure_weight_tying does so for two
    names only (embed_tokens, lm_head) and silently unties the rest, GPT-2's wte for one."""
    base = plain_model(model)
    head = base.get_output_embeddings()
    if head is not None:
        for ours, theirs in zip(wrapped_copies(head)[1:], wrapped_copies(base.get_input_embeddings())[1:], strict=True):
            ours.weight = theirs.weight


def _shortest_names(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Ends of names ("q_proj") that mean exactly `targets`, as other tools expect them; else full names."""
    short = sorted({t.rsplit(".", 1)[-1] for t in targets})
    meant = [n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in short]
    return short if sorted(meant) == sorted(targets) else targets
