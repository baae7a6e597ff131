"""The final model as transformers' Auto classes read it, written from a gathered state dict."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.files import directory_aside
from rlhf_cli.models.load import auto_class, is_classifier

MAX_SHARD_SIZE = "5GB"


def save_model(
    config: PretrainedConfig,
    state_dict: dict[str, Tensor],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = None,
    generation_config: GenerationConfig | None = None,
    stop: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    reward: Mapping[str, Any] | None = None,
) -> None:
    """Write weights (sharded safetensors), config, tokenizer, chat template and, of a causal LM, generation config.

    state_dict: every parameter and buffer of the model by name, whole, on CPU; tied names may be there twice or once.
    stop: the template's stop string; if it is one token, generation stops there as at eos. reward: what is known of a
    reward model's scores (mean, std, labels ...), becomes config.reward. The directory appears complete or not at all.
    """
    config = copy.deepcopy(config)
    config.use_cache = True
    if reward is not None:
        assert is_classifier(config), "only a sequence classifier has scores"
        config.reward = dict(reward)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise AssertionError(f"{len(tokenizer)} tokens for {config.get_text_config().vocab_size} rows")
    shell = _shell(config, state_dict)
    if not is_classifier(config):
        shell.generation_config = make_generation_config(tokenizer, generation_config, stop)
    for part in (shell.config, shell.config.get_text_config()):
        part.pad_token_id, part.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    with directory_aside(directory) as aside:
        shell.save_pretrained(aside, state_dict=dict(state_dict), max_shard_size=max_shard_size)
        tokenizer.save_pretrained(aside)


def make_generation_config(
    tokenizer: PreTrainedTokenizerBase, base: GenerationConfig | None = None, stop: str | None = None
) -> GenerationConfig:
    """How the saved model generates: as `base`, ending at eos, at base's own end tokens and at a stop token.

    Published models name a temperature and forget do_sample (Vicuna 1.5, early Llama 2), which transformers reads but
    refuses to write. So sampling is turned on where it is described, and what still contradicts itself is left out.
    """
    made = copy.deepcopy(base) if base is not None else GenerationConfig()
    made.use_cache = True
    ends = [tokenizer.eos_token_id]
    if made.eos_token_id is not None:
        ends += made.eos_token_id if isinstance(made.eos_token_id, list) else [made.eos_token_id]
    if stop:
        ids = tokenizer(stop, add_special_tokens=False).input_ids
        ends += ids if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else []
    ends = list(dict.fromkeys(ends))
    if not _is_valid(made):
        made.do_sample = True
        made = made if _is_valid(made) else GenerationConfig(bos_token_id=made.bos_token_id)
    made.eos_token_id = ends if len(ends) > 1 else ends[0]
    made.pad_token_id = tokenizer.pad_token_id
    return made


def _is_valid(config: GenerationConfig) -> bool:
    """Whether transformers would write it."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _shell(config: PretrainedConfig, state_dict: dict[str, Tensor]) -> PreTrainedModel:
    """The model without storage: it knows which names are tied and how a config says its class."""
    dtype = next(t.dtype for t in state_dict.values() if t.is_floating_point())
    with torch.device("meta"):
        shell: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    expected = shell.state_dict()
    tied = set(shell.all_tied_weights_keys)
    missing = [n for n in expected if n not in state_dict and n not in tied]
    extra = [n for n in state_dict if n not in expected]
    assert not missing, f"parameters that were not gathered: {missing[:3]}"
    assert not extra, f"names that the model does not have: {extra[:3]}"
    wrong = [n for n, t in state_dict.items() if t.shape != expected[n].shape]
    assert not wrong, f"shapes that the model does not have: {wrong[:3]}"
    return shell
