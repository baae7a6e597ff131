"""Saving from a state dict, loading, growing embeddings, and the models that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from rlhf_cli.errors import ModelError
from rlhf_cli.models.load import grow_embeddings, load_config, load_policy, resolve_dtype
from rlhf_cli.models.save import make_generation_config, save_model
from rlhf_cli.models.scratch import new_model
from rlhf_cli.schema import ModelConfig
from tests.tiny_models import ARCHS, noisy, tiny_config, tiny_model, tiny_tokenizer

FP32 = torch.float32
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_saved_model_loads_and_generates_the_same(arch: str, tie: bool, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(arch, tie), tiny_tokenizer()
    target = tmp_path / "run" / "model"
    model.config.use_cache = False  # as it is while training
    model.config.eos_token_id = model.config.pad_token_id = None  # as with a tokenizer that was not the model's own
    weights = {n: t.clone() for n, t in model.state_dict().items()}  # tied names as two tensors, as some gathers give
    save_model(model.config, weights, target, tokenizer, chat_template="{{ messages }}", max_shard_size="20KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert [p.name for p in target.parent.iterdir()] == ["model"]  # nothing left beside it
    loaded, text = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.use_cache
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.config.architectures == [type(model).__name__]
    assert text.chat_template == "{{ messages }}"
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False, generation_config=loaded.generation_config)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    again = load_policy(ModelConfig(path=str(target)), target, FP32, num_tokens=len(tokenizer))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not again.config.use_cache


def test_dtype_is_kept_and_rotary_frequencies_are_not_rounded(tmp_path: Path) -> None:
    model = new_model(tiny_config(), torch.bfloat16, 0)
    save_model(model.config, dict(model.state_dict()), tmp_path / "m", tiny_tokenizer())
    loaded = load_policy(ModelConfig(), tmp_path / "m", torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, tiny_model().model.rotary_emb.inv_freq)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert load_policy(ModelConfig(), tmp_path / "m", FP32).dtype == FP32


def test_a_save_that_fails_leaves_the_old_model(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model.config, dict(model.state_dict()), tmp_path / "m", tiny_tokenizer())
    before = sorted(p.name for p in (tmp_path / "m").iterdir())
    partial = dict(model.state_dict())
    partial.popitem()
    with pytest.raises(AssertionError, match="not gathered"):
        save_model(model.config, partial, tmp_path / "m", tiny_tokenizer())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == before


def test_generation_stops_at_eos_at_the_base_models_ends_and_at_a_one_token_stop() -> None:
    tokenizer = tiny_tokenizer("bpe")
    eos = tokenizer.eos_token_id
    assert make_generation_config(tokenizer).eos_token_id == eos
    base = GenerationConfig(eos_token_id=[eos, 7], temperature=0.5, do_sample=True)
    made = make_generation_config(tokenizer, base, stop="###Human")  # many tokens
    assert made.eos_token_id == [eos, 7]
    assert made.temperature == 0.5
    (hash_id,) = tokenizer("#").input_ids
    assert make_generation_config(tokenizer, base, stop="#").eos_token_id == [eos, 7, hash_id]
    assert base.eos_token_id == [eos, 7]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),  # Vicuna 1.5
        ({"do_sample": False, "top_k": 10}, {"do_sample": True, "top_k": 10}),
        ({"temperature": 0.9, "num_beams": 1, "length_penalty": 2.0}, {"temperature": None, "length_penalty": None}),
    ],
)
def test_generation_settings_that_contradict_themselves_do_not_forbid_to_save(
    tmp_path: Path, settings: dict[str, Any], kept: dict[str, Any]
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    base = GenerationConfig(eos_token_id=7, **settings)
    save_model(model.config, dict(model.state_dict()), tmp_path / "m", tokenizer, generation_config=base)
    loaded = GenerationConfig.from_pretrained(tmp_path / "m")
    assert loaded.eos_token_id == [tokenizer.eos_token_id, 7]
    assert {name: getattr(loaded, name) for name in kept} == kept


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_new_rows_are_the_mean_of_the_old(arch: str, tie: bool) -> None:
    model = tiny_model(arch, tie)
    old = model.config.vocab_size
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    logits = model(IDS).logits
    assert grow_embeddings(model, old) == 0
    assert grow_embeddings(model, old - 3) == 0
    assert model.get_input_embeddings().num_embeddings == old
    assert grow_embeddings(model, old + 2) == 2
    assert model.config.vocab_size == old + 2
    for layer, was in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
        assert torch.equal(layer.weight[:old], was)
        torch.testing.assert_close(layer.weight[old:], was.mean(0).expand(2, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tie
    torch.testing.assert_close(model(IDS).logits[..., :old], logits)


def test_growing_covers_a_heads_bias() -> None:
    from transformers import GPTJConfig

    config = GPTJConfig(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    model = noisy(new_model(config, FP32, 0))
    bias = model.lm_head.bias.detach().clone()
    grow_embeddings(model, 23)
    torch.testing.assert_close(model.lm_head.bias, torch.cat([bias, bias.mean().expand(3)]))


def test_scratch_models_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first, state = new_model(tiny_config(), FP32, 1), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    same, other = new_model(tiny_config(), FP32, 1), new_model(tiny_config(), FP32, 2)
    equal = [torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True)]
    assert all(equal)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("arch", ARCHS)
def test_scratch_config_says_what_was_asked(arch: str) -> None:
    config, tokenizer = tiny_config(arch, tie=True, layers=3, dropout=0.25), tiny_tokenizer()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 1024
    dropouts = [getattr(config, n, None) for n in ("attention_dropout", "attn_pdrop")]
    assert 0.25 in dropouts
    model = new_model(config, FP32, 0)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def write_config(directory: Path, **values: object) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))


def test_refused_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"model\.path: /nowhere/at/all does not exist"):
        load_config("/nowhere/at/all")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_config(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        load_config(tmp_path / "file")
    monkeypatch.setattr("rlhf_cli.models.source.is_offline_mode", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load_config("nobody/no-such-model")
    LlamaForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "reward")
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification.*reward model"):
        load_config(tmp_path / "reward")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="type t5"):
        load_config(tmp_path / "t5")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="BertForMaskedLM"):
        load_config(tmp_path / "bert")


def test_refused_weights(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model.config, dict(model.state_dict()), tmp_path / "m", tiny_tokenizer())
    weights = tmp_path / "m" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    whole = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])  # a download that broke off
    with pytest.raises(ModelError, match=r"the model cannot be loaded: .*incomplete"):
        load_policy(ModelConfig(), tmp_path / "m", FP32)
    save_file({n: t for n, t in whole.items() if "layers.1.mlp" not in n}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 3 of the model's tensors \(model\.layers\.1\.mlp"):
        load_policy(ModelConfig(), tmp_path / "m", FP32)
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_policy(ModelConfig(), tmp_path / "m", FP32)
    torch.save(whole, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load_policy(ModelConfig(), tmp_path / "m", FP32)
    (tmp_path / "m" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "m" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter of some/base.*merge-lora"):
        load_policy(ModelConfig(), tmp_path / "m", FP32)


def test_nf4_needs_a_gpu(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model.config, dict(model.state_dict()), tmp_path / "m", tiny_tokenizer())
    with pytest.raises(ModelError, match=r"nf4 runs on CUDA GPUs only.*quantization=none"):
        load_policy(ModelConfig(quantization="nf4"), tmp_path / "m", FP32, torch.device("cpu"))


def test_dtype_names() -> None:
    cpu = torch.device("cpu")
    assert [resolve_dtype(n, cpu) for n in ("auto", "bf16", "fp32", "fp16")] == [  # type: ignore[arg-type]
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.float16,
    ]
