"""Tiny reward models, classifiers and run directories that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_cli.models.lora import add_lora, save_adapter
from rlhf_cli.models.reward import load_reward_model, new_reward_model
from rlhf_cli.models.save import save_model
from rlhf_cli.schema import LoraConfig, ModelConfig
from tests.data_tokenizers import byte_bpe
from tests.tiny_models import noisy, tiny_config, tiny_model

WORDS = ["the", "a", "of", "what", "is", "floor", "room", "good", "bad", "yes", "no", "why", "low", "side"]


def write_decoder(
    directory: Path, arch: str = "llama", labels: list[str] | None = None, tokenizer: Any = None, **more: Any
) -> PreTrainedModel:
    """A sequence classifier of a decoder, as `rlhf rm` writes it. more: config.reward, jinja."""
    tokenizer = tokenizer or byte_bpe()
    config = tiny_config(arch)
    config.vocab_size = len(tokenizer)
    model = noisy(new_reward_model(config, labels, torch.float32, 0))
    weights = dict(model.state_dict())
    save_model(model.config, weights, directory, tokenizer, more.get("jinja"), reward=more.get("reward"))
    return model


def write_policy(directory: Path, arch: str = "llama") -> Path:
    """A causal LM."""
    tokenizer = byte_bpe()
    model = tiny_model(arch)
    model.resize_token_embeddings(len(tokenizer))
    save_model(model.config, dict(model.state_dict()), directory, tokenizer)
    return directory


def write_adapter(directory: Path, base: Path, labels: list[str] | None = None) -> torch.nn.Module:
    """A LoRA reward model on the policy in `base`; returns it with the adapter in place."""
    model = load_reward_model(ModelConfig(path=str(base)), base, torch.float32, labels, seed=0)
    wrapped = noisy(add_lora(model, LoraConfig(enabled=True, r=2), "SEQ_CLS"))  # type: ignore[arg-type]
    # The base's weights are those of the file again, only what is trained has moved.
    trained = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    save_adapter(wrapped, trained, directory, byte_bpe(), str(base))  # type: ignore[arg-type]
    return wrapped


def write_run(run_dir: Path, kind: str = "reward", task: str | None = "sequence_classification", **more: Any) -> Path:
    """manifest.json of a finished run whose model is in run_dir/model."""
    run_dir.mkdir(parents=True, exist_ok=True)
    output = {"kind": kind, "task": task, "path": "model", "format": "hf"}
    manifest = {"stage": "rm", "status": "complete", "output": output, "template": None, "reward": None, **more}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    return run_dir


def word_tokenizer(roberta: bool = False) -> PreTrainedTokenizerFast:
    """Like BERT's: [CLS] text [SEP], pairs with segment numbers; no EOS, no template."""
    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    cls, sep, pad, unk = ("<s>", "</s>", "<pad>", "<unk>") if roberta else ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS, "?", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        unk_token=unk,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write_encoder(directory: Path, labels: list[str], roberta: bool = False, positions: int = 32) -> PreTrainedModel:
    """A BERT or RoBERTa classifier as transformers writes it."""
    tokenizer = word_tokenizer(roberta)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": positions, "pad_token_id": tokenizer.pad_token_id,
        "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)},
    }  # fmt: skip
    torch.manual_seed(0)
    if roberta:
        model: PreTrainedModel = RobertaForSequenceClassification(RobertaConfig(**shape, type_vocab_size=2))
    else:
        model = BertForSequenceClassification(BertConfig(**shape))
    noisy(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model
