"""Merged model = base + adapter as PEFT computes it, for every kind of adapter that is not refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf_cli.models import merge as merge_module
from rlhf_cli.models.load import grow_embeddings, load_policy
from rlhf_cli.models.lora import add_lora, save_adapter
from rlhf_cli.runtime.progress import Display
from rlhf_cli.schema import LoraConfig, MergeConfig, ModelConfig
from rlhf_cli.stages import merge_lora
from tests.merge_cases import IDS, classifier_of, logits, save_base, save_peft
from tests.tiny_models import ARCHS, noisy, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about tied embeddings and Conv1D
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., Path]:
    """merge(adapter, **options) -> directory of the merged model; without the stage's own comparison."""

    def run(adapter: Path, **options: Any) -> Path:
        config = MergeConfig(adapter=str(adapter), **({"verify": "never"} | options))
        run_dir = tmp_path / "merged"
        run_dir.mkdir(exist_ok=True)
        merge_lora.merge(config, run_dir, Display(io.StringIO(), "none", "merge-lora"))
        return run_dir / "model"

    return run


def causal(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def scorer(directory: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)


def weights(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_policy(arch: str, tie: bool, tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base", arch, tie, size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    wrapped = save_peft(tmp_path / "adapter", causal(base), arch, tokenizer, base)
    model = merge(tmp_path / "adapter", max_shard_size="30KB")
    files = {f.name: load_file(f) for f in model.glob("*.safetensors")}
    assert len(files) > 2
    assert all(len(f) == 1 or sum(t.nbytes for t in f.values()) <= 30_000 for f in files.values())
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(base).keys(), "the names that other tools know"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(model).values())
    torch.testing.assert_close(logits(causal(model)), logits(wrapped), **CLOSE)
    assert (logits(causal(base)) - logits(wrapped)).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(model).chat_template == "{{ x }}"
    assert GenerationConfig.from_pretrained(model).eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("arch", ARCHS)
def test_reward_model_keeps_its_head(arch: str, labels: int, tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base", arch, size="40KB")
    wrapped = save_peft(tmp_path / "adapter", classifier_of(base, labels), arch, tokenizer, base, task_type="SEQ_CLS")
    model = merge(tmp_path / "adapter", max_shard_size="30KB")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(model, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"], "a causal LM's head was kept"
    assert loaded.config.architectures == [type(loaded).__name__]
    assert loaded.config.num_labels == labels
    assert loaded.config.problem_type == (None if labels == 1 else "single_label_classification")
    assert torch.equal(loaded.score.weight, wrapped.get_base_model().score.modules_to_save["default"].weight)
    ragged = torch.cat([IDS, IDS.flip(1)])
    ragged[1, 5:] = tokenizer.pad_token_id
    torch.testing.assert_close(logits(loaded, ragged), logits(wrapped, ragged), **CLOSE)
    assert not (model / "generation_config.json").exists()


def test_reward_model_on_a_base_that_is_one(tmp_path: Path, merge: Callable[..., Path]) -> None:
    policy, tokenizer = save_base(tmp_path / "policy")
    base = classifier_of(policy, 2)
    base.config.id2label, base.config.label2id = {0: "sad", 1: "happy"}, {"sad": 0, "happy": 1}
    base.save_pretrained(tmp_path / "base")
    # task CAUSAL_LM would not do; without modules_to_save the head stays the base's
    wrapped = save_peft(tmp_path / "adapter", base, "llama", tokenizer, tmp_path / "base", task_type=None)
    model = merge(tmp_path / "adapter")
    assert scorer(model).config.id2label == {0: "sad", 1: "happy"}
    torch.testing.assert_close(logits(scorer(model)), logits(wrapped), **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.down_proj": 3}},
        {"alpha_pattern": {"v_proj": 3.0, "^model.layers.0.self_attn.q_proj": 1}},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=lambda s: next(iter(s)) + str(len(str(s))),
)
def test_settings(settings: dict[str, Any], tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base")
    wrapped = save_peft(tmp_path / "adapter", causal(base), "llama", tokenizer, base, **settings)
    torch.testing.assert_close(logits(causal(merge(tmp_path / "adapter"))), logits(wrapped), **CLOSE)


@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),  # PEFT trains two copies
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({}, True),
    ],
)
def test_tied_embeddings(
    settings: dict[str, Any], stays_tied: bool, tmp_path: Path, merge: Callable[..., Path]
) -> None:
    base, tokenizer = save_base(tmp_path / "base", tie=True)
    wrapped = save_peft(tmp_path / "adapter", causal(base), "llama", tokenizer, base, **settings)
    model = merge(tmp_path / "adapter")
    assert ("lm_head.weight" in weights(model)) != stays_tied
    loaded = causal(model)
    assert loaded.config.tie_word_embeddings == stays_tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == stays_tied
    torch.testing.assert_close(logits(loaded), logits(wrapped), **CLOSE)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_new_tokens_that_were_trained(arch: str, tie: bool, tmp_path: Path, merge: Callable[..., Path]) -> None:
    """As our own stages train and save them."""
    base, tokenizer = save_base(tmp_path / "base", arch, tie)
    tokenizer.add_tokens(["    ", "\n\n"])
    policy = load_policy(ModelConfig(), base, torch.float32, num_tokens=len(tokenizer))
    lora = LoraConfig(enabled=True, r=4, alpha=8.0)
    wrapped = add_lora(policy, lora, train_embeddings=True)
    trained = {n: p for n, p in wrapped.state_dict(keep_vars=True).items() if p.requires_grad}
    with torch.no_grad():
        for parameter in {id(p): p for p in trained.values()}.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    # Names of tied weights come with one and the same tensor, as the engine gathers them.
    gathered = {n: p.detach() for n, p in trained.items()}
    save_adapter(wrapped, gathered, tmp_path / "adapter", tokenizer, str(base))
    model = merge(tmp_path / "adapter")
    loaded = causal(model)
    assert loaded.config.vocab_size == len(tokenizer) == loaded.get_input_embeddings().num_embeddings
    assert loaded.config.tie_word_embeddings == tie
    assert len(AutoTokenizer.from_pretrained(model)) == len(tokenizer)
    ids = torch.cat([IDS, torch.tensor([[len(tokenizer) - 2, len(tokenizer) - 1]])], dim=1)
    torch.testing.assert_close(logits(loaded, ids), logits(wrapped.eval(), ids), **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_new_pad_token_gets_the_row_it_had_in_training(arch: str, tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base", arch)
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    grown = load_policy(ModelConfig(), base, torch.float32, num_tokens=len(tokenizer))
    wrapped = save_peft(tmp_path / "adapter", grown, arch, tokenizer, base)
    loaded = causal(merge(tmp_path / "adapter"))
    assert loaded.config.vocab_size == len(tokenizer)
    assert loaded.config.pad_token_id == len(tokenizer) - 1
    for ours, theirs in (
        (loaded.get_input_embeddings(), grown.get_input_embeddings()),
        (loaded.lm_head, grown.lm_head),
    ):
        torch.testing.assert_close(ours.weight, theirs.weight)
    ids = torch.cat([IDS, torch.tensor([[len(tokenizer) - 1]])], dim=1)
    torch.testing.assert_close(logits(loaded, ids), logits(wrapped, ids), **CLOSE)


def test_a_padded_vocabulary_that_peft_cut(tmp_path: Path, merge: Callable[..., Path]) -> None:
    """resize_token_embeddings(len(tokenizer)) on a model with spare rows; PEFT then saves the embeddings themselves."""
    base, tokenizer = save_base(tmp_path / "base")
    wide = causal(base)
    grow_embeddings(wide, 64)
    wide.save_pretrained(base)
    policy = causal(base)
    policy.resize_token_embeddings(len(tokenizer))
    wrapped = save_peft(tmp_path / "adapter", policy, "llama", tokenizer, base, save={"save_embedding_layers": True})
    loaded = causal(merge(tmp_path / "adapter", verify="always"))
    assert loaded.config.vocab_size == len(tokenizer) < 64
    torch.testing.assert_close(logits(loaded), logits(wrapped), **CLOSE)


def test_a_hub_checkpoint_without_the_models_prefix(tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base", "gpt2", tie=True)
    tensors = {k.removeprefix("transformer."): v for k, v in weights(base).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a mask that old versions stored
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    wrapped = save_peft(tmp_path / "adapter", causal(base), "gpt2", tokenizer, base)
    scored = save_peft(tmp_path / "rm", classifier_of(base), "gpt2", tokenizer, base, task_type="SEQ_CLS")
    torch.testing.assert_close(logits(causal(merge(tmp_path / "adapter"))), logits(wrapped), **CLOSE)
    torch.testing.assert_close(logits(scorer(merge(tmp_path / "rm"))), logits(scored), **CLOSE)


def test_arithmetic_is_fp32_and_the_result_is_rounded_once(tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_peft(tmp_path / "adapter", causal(base, torch.bfloat16), "llama", tokenizer, base)
    name = "model.layers.1.self_attn.q_proj"
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    exact = weights(base)[f"{name}.weight"].float() + 2.0 * b @ a  # alpha / r = 8 / 4
    model = merge(tmp_path / "adapter")
    assert {t.dtype for t in weights(model).values()} == {torch.bfloat16}
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(weights(model)[f"{name}.weight"], exact.bfloat16())
    full = merge(tmp_path / "adapter", output_dtype="fp32")
    assert {t.dtype for t in weights(full).values()} == {torch.float32}
    torch.testing.assert_close(weights(full)[f"{name}.weight"], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_pieces_of_few_rows_make_the_same_model(
    arch: str, tmp_path: Path, merge: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = save_base(tmp_path / "base", arch)
    tokenizer.add_tokens(["    ", "\n\n"])
    save_peft(tmp_path / "adapter", causal(base), arch, tokenizer, base)
    whole = weights(merge(tmp_path / "adapter"))
    monkeypatch.setattr(merge_module, "PIECE_ELEMENTS", 32 * 7)  # seven rows of width 32, one of the wider ones
    pieces = weights(merge(tmp_path / "adapter"))
    assert pieces.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-6, atol=1e-6)


def test_experts_that_transformers_fuses_stay_as_they_are_stored(tmp_path: Path, merge: Callable[..., Path]) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    _, tokenizer = save_base(tmp_path / "other")
    shape = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    noisy(MixtralForCausalLM(shape)).save_pretrained(tmp_path / "base")
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in weights(tmp_path / "base")
    wrapped = save_peft(
        tmp_path / "adapter", causal(tmp_path / "base"), tokenizer=tokenizer, base_path=tmp_path / "base",
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    model = merge(tmp_path / "adapter")
    assert weights(model).keys() == weights(tmp_path / "base").keys()
    torch.testing.assert_close(logits(causal(model)), logits(wrapped), **CLOSE)


def test_a_base_stored_in_another_form_is_loaded_whole(tmp_path: Path, merge: Callable[..., Path]) -> None:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    _, tokenizer = save_base(tmp_path / "other")
    shape = HrmTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    noisy(HrmTextForCausalLM(shape)).save_pretrained(tmp_path / "base")
    wrapped = save_peft(
        tmp_path / "adapter", causal(tmp_path / "base"), tokenizer=tokenizer, base_path=tmp_path / "base",
        target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    torch.testing.assert_close(logits(causal(merge(tmp_path / "adapter"))), logits(wrapped), **CLOSE)


def test_a_pickled_adapter_that_was_asked_for(tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base")
    wrapped = save_peft(
        tmp_path / "adapter", causal(base), "llama", tokenizer, base, save={"safe_serialization": False}
    )
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    model = merge(tmp_path / "adapter", allow_pickle=True)
    torch.testing.assert_close(logits(causal(model)), logits(wrapped), **CLOSE)


def test_an_adapter_without_tokenizer_takes_the_bases(tmp_path: Path, merge: Callable[..., Path]) -> None:
    base, tokenizer = save_base(tmp_path / "base")
    wrapped = save_peft(tmp_path / "adapter", causal(base), "llama")
    model = merge(tmp_path / "adapter", base=str(base))
    assert AutoTokenizer.from_pretrained(model).get_vocab() == tokenizer.get_vocab()
    torch.testing.assert_close(logits(causal(model)), logits(wrapped), **CLOSE)


def test_peft_alone_loads_what_the_tests_compare_with(tmp_path: Path) -> None:
    """The reference itself: an adapter that was read from disk, not only the one in memory."""
    base, tokenizer = save_base(tmp_path / "base")
    wrapped = save_peft(tmp_path / "adapter", causal(base), "llama", tokenizer, base)
    loaded = PeftModel.from_pretrained(causal(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval()), logits(wrapped))
    assert not torch.equal(logits(loaded), logits(tiny_model()))
