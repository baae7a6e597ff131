"""Reward models: scores as transformers gives them, heads, what is loaded, refused, adapted, trained and saved."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_cli.errors import ModelError
from rlhf_cli.models.load import enable_gradient_checkpointing, load_policy, read_config
from rlhf_cli.models.lora import add_lora, lora_targets, plain_model, save_adapter
from rlhf_cli.models.memory import estimate_memory
from rlhf_cli.models.reward import (
    ScoreScale,
    _check_reads_last_token,
    enable_scores,
    label_names,
    load_reward_config,
    load_reward_model,
    new_reward_model,
    reward_config,
    score_scale,
    set_score_scale,
)
from rlhf_cli.models.save import save_model
from rlhf_cli.models.trainable import apply_trainable, count_parameters, find_blocks
from rlhf_cli.schema import DeepspeedConfig, LoraConfig, ModelConfig, TrainableConfig
from tests.reward_cases import FP32, ragged, random_rows, scores_of, tiny_reward
from tests.tiny_models import ARCHS, tiny_config, tiny_model, tiny_tokenizer

ROWS = random_rows(0, 6)

LABELS = ["sad", "neutral", "happy"]


def saved(model: PreTrainedModel, directory: Path, **more: Any) -> Path:
    save_model(model.config, dict(model.state_dict()), directory, tiny_tokenizer(), **more)
    return directory


def load(path: Path, labels: list[str] | None = None, seed: int = 0, **more: Any) -> PreTrainedModel:
    return load_reward_model(ModelConfig(), path, FP32, labels, seed, **more)


def one_by_one(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """(N, C) by transformers' own forward, each row alone and unpadded: nothing that pooling could get wrong."""
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows]).detach()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.state_dict(keep_vars=True).items() if p.requires_grad}


def moved(model: nn.Module) -> set[str]:
    """Names of parameters that two steps on pairs change (an adapter's A has no gradient in the first)."""
    enable_scores(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        scores = scores_of(model, ROWS)[:, 0]
        (-F.logsigmoid(scores[:3] - scores[3:]).mean() + 0.01 * (scores**2).mean()).backward()
        optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


# --- scores


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("arch", ARCHS)
def test_scores_are_those_of_transformers(arch: str, labels: list[str] | None, lora: bool, tmp_path: Path) -> None:
    model: Any = tiny_reward(arch, labels)
    path = saved(model, tmp_path / "base")
    own: Any = AutoModelForSequenceClassification.from_pretrained(path)
    if lora:
        model = add_lora(model, LoraConfig(enabled=True, r=4), "SEQ_CLS")
        moved(model)
        save_adapter(model, trained_weights(model), tmp_path / "adapter", tiny_tokenizer(), str(path))
        own = PeftModel.from_pretrained(own, str(tmp_path / "adapter"))
    enable_scores(model.eval())
    scores = scores_of(model, ROWS)
    assert scores.shape == (len(ROWS), len(labels or [None]))
    assert scores.std(0).min() > 1e-2  # so that a wrong row or position would show
    torch.testing.assert_close(scores, one_by_one(own, ROWS), atol=1e-5, rtol=0)
    pad = own.config.pad_token_id
    for left in (False, True):
        batch = ragged(ROWS, pad, left)
        del batch["last"]
        torch.testing.assert_close(own(**batch).logits, scores, atol=1e-5, rtol=0)
    # Padded on the left, with a mask and the index of the last column.
    torch.testing.assert_close(model(**ragged(ROWS, pad, left=True)), scores, atol=1e-5, rtol=0)
    # And however they are batched.
    parts = [scores_of(model, ROWS[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_text_may_end_with_the_padding_token(arch: str) -> None:
    model = tiny_reward(arch)
    pad = model.config.pad_token_id
    enable_scores(model)
    rows = [[5, 6, 7, pad], [8, 9, 10, 11, 12, 13], [pad, pad]]
    alone = torch.cat([scores_of(model, [row]) for row in rows])
    torch.testing.assert_close(scores_of(model, rows), alone, atol=1e-5, rtol=0)
    hidden = model.base_model(torch.tensor([rows[0]])).last_hidden_state
    torch.testing.assert_close(alone[0], (hidden[0, 3] @ model.score.weight.T).detach(), atol=1e-5, rtol=0)
    batch = ragged(rows, pad)
    del batch["last"]
    assert (model(**batch).logits - alone)[0].abs() > 1e-4  # looking for padding reads another token


def test_other_calls_are_left_as_they_were_and_a_copy_has_its_own() -> None:
    model = tiny_reward()
    batch = ragged(ROWS, 0)
    last = batch.pop("last")
    before = model(**batch)
    enable_scores(model)
    after = model(**batch)
    assert type(after) is type(before)
    assert torch.equal(after.logits, before.logits)
    twin = copy.deepcopy(model)
    scores = model(**batch, last=last)
    twin.score.weight.data.mul_(2)
    torch.testing.assert_close(twin(**batch, last=last), 2 * scores)
    assert torch.equal(model(**batch, last=last), scores)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_checkpointing_changes_no_gradient(arch: str, lora: bool) -> None:
    grads = []
    for recompute in (False, True):
        model: nn.Module = tiny_reward(arch)
        if recompute:
            enable_gradient_checkpointing(model)  # type: ignore[arg-type]
        if lora:
            model = add_lora(model, LoraConfig(enabled=True, r=4), "SEQ_CLS")  # type: ignore[arg-type]
        enable_scores(model)
        calls: list[int] = []
        # Inside the block: hooks of the block itself are not called again.
        inner = find_blocks(plain_model(model))[0].get_submodule("mlp")
        inner.register_forward_pre_hook(lambda *_, log=calls: log.append(1))
        scores_of(model.train(), ROWS).square().sum().backward()
        assert len(calls) == 1 + recompute
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("score" in n for n in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_the_gradient_is_that_of_transformers_logits() -> None:
    model, other = tiny_reward(labels=LABELS), tiny_reward(labels=LABELS)
    enable_scores(model)
    targets = torch.tensor([0, 1, 2, 2, 1, 0])
    F.cross_entropy(scores_of(model, ROWS), targets).backward()
    F.cross_entropy(torch.cat([other(torch.tensor([r])).logits for r in ROWS]), targets).backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_low_precision_scores_are_not_rounded() -> None:
    model = tiny_reward().to(torch.bfloat16)
    enable_scores(model)
    scores = scores_of(model, ROWS)
    assert scores.dtype == FP32
    assert not torch.equal(scores, scores.bfloat16().float())
    hidden = model.base_model(torch.tensor([ROWS[0]]), use_cache=False).last_hidden_state[:, -1]
    alone = scores_of(model, [ROWS[0]])
    torch.testing.assert_close(alone, hidden.float() @ model.score.weight.float().T)
    alone.sum().backward()
    assert model.score.weight.grad is not None
    torch.testing.assert_close(model.score.weight.grad, hidden)  # d score / d weight


# --- heads and loading


def test_the_head_starts_small_by_its_seed_alone(tmp_path: Path) -> None:
    path = saved(tiny_model(), tmp_path / "m")
    labels = [f"class {i}" for i in range(200)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load(path, labels, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    head = first.score.weight.detach()
    # N(0, 1/33): the standard error of a standard deviation from 6400 numbers is 1/sqrt(12800) of it.
    assert head.shape == (200, 32)
    assert abs(float(head.std()) * 33**0.5 - 1) < 5 / 12800**0.5
    assert abs(float(head.mean())) < 5 / (33 * 6400) ** 0.5
    torch.manual_seed(2)
    assert torch.equal(load(path, labels, seed=3).score.weight, head)
    assert not torch.equal(load(path, labels, seed=4).score.weight, head)
    new = new_reward_model(tiny_config(), labels, FP32, 3)
    assert torch.equal(new.score.weight, head)
    # Another stream than the weights', which a new model of the same seed starts with.
    naive = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    assert abs(float(torch.corrcoef(torch.stack([naive.flatten(), head.flatten()]))[0, 1])) < 5 / 6400**0.5
    again = new_reward_model(tiny_config(), labels, FP32, 3)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))
    assert load_reward_model(ModelConfig(), path, torch.bfloat16, None, 3).score.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tie", [False, True])
def test_a_causal_lm_keeps_its_backbone(arch: str, tie: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(arch, tie)
    path = saved(model, tmp_path / "m")
    logging.getLogger("transformers").addHandler(caplog.handler)  # its loggers do not propagate
    loaded = load(path, LABELS, num_tokens=model.config.vocab_size + 2)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "LOAD REPORT" not in caplog.text
    vocab = model.config.vocab_size
    assert loaded.get_input_embeddings().num_embeddings == vocab + 2
    for name, tensor in model.base_model.named_parameters():
        own = loaded.base_model.get_parameter(name)
        assert torch.equal(own[:vocab] if own.shape != tensor.shape else own, tensor), name
    assert loaded.score.weight.requires_grad
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {"sad": 0, "neutral": 1, "happy": 2}
    assert not loaded.config.use_cache
    config = load_reward_config(path)
    assert (config.num_labels, config.architectures) == (1, [type(loaded).__name__])


def test_a_head_that_reads_a_narrower_embedding(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16
    )
    model = new_reward_model(config, None, FP32, 0).eval()
    assert model.score.weight.shape == (1, 16)
    enable_scores(model)
    torch.testing.assert_close(scores_of(model, ROWS), one_by_one(model, ROWS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_classifier_keeps_its_head(arch: str, tmp_path: Path) -> None:
    model = tiny_reward(arch, LABELS)
    path = saved(model, tmp_path / "m", reward={"mean": 1.5})
    loaded = load(path, LABELS, seed=9, num_tokens=model.config.vocab_size + 1)
    assert torch.equal(loaded.score.weight, model.score.weight)
    assert not hasattr(loaded.config, "reward")  # those moments are of the scores before this training
    enable_scores(loaded)
    torch.testing.assert_close(scores_of(loaded, ROWS), one_by_one(model, ROWS), atol=1e-5, rtol=0)
    assert load_reward_config(path).num_labels == 3


def test_labels_must_fit(tmp_path: Path) -> None:
    path = saved(tiny_reward(labels=LABELS), tmp_path / "three")
    with pytest.raises(
        ModelError, match=r"classifier with 3 labels \(sad, neutral, happy\), but comparisons train one"
    ):
        load(path)
    with pytest.raises(ModelError, match=r"3 labels \(sad, neutral, happy\), but the data has 2 \(a, b\)"):
        load(path, ["a", "b"])
    with pytest.raises(ModelError, match="in another order"):
        load(path, LABELS[::-1])
    one = saved(tiny_reward(), tmp_path / "one")
    with pytest.raises(ModelError, match=r"a classifier with 1 label, but the data has 3"):
        load(one, LABELS)
    config = json.loads((path / "config.json").read_text())
    config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
    (path / "config.json").write_text(json.dumps(config))
    assert label_names(read_config(path)) is None
    assert label_names(load(path, LABELS).config) == LABELS  # nobody had named them


def test_incomplete_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = saved(tiny_model(), tmp_path / "m")
    weights = path / "model.safetensors"
    whole = load_file(weights)
    save_file({n: t for n, t in whole.items() if "layers.1.mlp" not in n}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 3 of the model's tensors \(model\.layers\.1\.mlp"):
        load(path)
    save_file(whole | {"model.layers.2.mlp.up_proj.weight": torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of the stored tensors have no place .*model\.layers\.2\.mlp"):
        load(path)
    # What older versions of transformers stored beside the weights is no sign of another model.
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "h.0.attn.masked_bias": torch.zeros(1)}
    save_file(whole | old, weights, {"format": "pt"})
    assert load(path).config.num_labels == 1
    path = saved(tiny_reward(), tmp_path / "headless")
    whole = load_file(path / "model.safetensors")
    del whole["score.weight"]
    save_file(whole, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 .*score\.weight"):
        load(path)


def test_models_without_a_score_at_the_last_token_are_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=1, **shape)).save_pretrained(tmp_path / "bert")
    for call in (load_reward_config, load):
        with pytest.raises(ModelError, match=r"BertForSequenceClassification does not read a score.*allowed: decoders"):
            call(tmp_path / "bert")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="type t5, which has no causal"):
        load_reward_config(tmp_path / "t5")
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"type vit, of which transformers has no sequence classifier"):
        load_reward_config(tmp_path / "vit")


@pytest.mark.parametrize("way", ["averages scores", "reads the first", "changes the hidden states"])
def test_a_classifier_that_pools_otherwise_is_refused(way: str) -> None:
    model = tiny_reward()
    _check_reads_last_token(model, "here")

    class Custom(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            hidden = self.base_model(input_ids).last_hidden_state
            logits = self.score(2 * hidden if "hidden" in way else hidden)
            picked = {"averages scores": logits.mean(1), "reads the first": logits[:, 0]}.get(way, logits[:, -1])
            return SequenceClassifierOutput(logits=picked)

    model.__class__ = Custom
    with pytest.raises(ModelError, match=r"here as a Custom does not read a score from the last token"):
        _check_reads_last_token(model, "here")


# --- saving


@pytest.mark.parametrize("labels", [None, LABELS])
def test_what_is_saved(labels: list[str] | None, tmp_path: Path) -> None:
    model = new_reward_model(tiny_config(), labels, FP32, 0)
    info = {"mean": 0.25, "std": 1.5, "type": "pairwise", "labels": labels}
    path = saved(model, tmp_path / "m", reward=info, max_shard_size="20KB", chat_template="{{ x }}")
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["reward"] == info
    assert config["pad_token_id"] == tiny_tokenizer().pad_token_id
    assert config["eos_token_id"] == tiny_tokenizer().eos_token_id
    assert config.get("problem_type") == (None if labels is None else "single_label_classification")
    assert len(config["id2label"]) == (1 if labels is None else 3)
    assert not (path / "generation_config.json").exists()
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(path).chat_template == "{{ x }}"
    loaded = AutoModelForSequenceClassification.from_pretrained(path)
    assert loaded.config.reward == info
    assert torch.equal(loaded.score.weight, model.score.weight)
    if labels is not None:
        assert loaded(torch.tensor([[5, 6]]), labels=torch.tensor([2])).loss > 0  # transformers takes them as classes
    with pytest.raises(ModelError, match="reward model or classifier"):
        load_policy(ModelConfig(), path, FP32)


def test_a_policy_has_no_reward(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="only a sequence classifier"):
        saved(tiny_model(), tmp_path / "m", reward={"mean": 0.0})


# --- adapters


def lora(targets: str | list[str] = "all-linear") -> LoraConfig:
    return LoraConfig(enabled=True, r=4, alpha=8.0, target_modules=targets)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_head_is_trained_beside_the_adapter(arch: str) -> None:
    model = tiny_reward(arch)
    head, expected = model.score.weight.detach().clone(), one_by_one(model, ROWS)
    wrapped = add_lora(model, lora(), "SEQ_CLS")
    copied = wrapped.get_parameter("base_model.model.score.modules_to_save.default.weight")
    assert torch.equal(copied, head)
    enable_scores(wrapped)
    torch.testing.assert_close(scores_of(wrapped, ROWS), expected, atol=1e-5, rtol=0)
    names = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert {n for n in names if "lora_" not in n} == {"base_model.model.score.modules_to_save.default.weight"}
    linear_per_block = {"llama": 7, "qwen3": 7, "gpt2": 4, "gpt_neox": 4}[arch]
    assert len(names) == 1 + 2 * 2 * linear_per_block
    assert moved(wrapped) == names
    assert torch.equal(wrapped.get_parameter("base_model.model.score.original_module.weight"), head)


def test_the_head_is_no_target_of_an_adapter() -> None:
    model = tiny_reward()
    assert len(lora_targets(model, lora())) == 14
    assert len(lora_targets(model, lora(".*"))) == 14
    with pytest.raises(ModelError, match=r"'score' is no linear layer"):
        lora_targets(model, lora(["q_proj", "score"]))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT about tied embeddings, when it loads
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_saved_adapter_is_read_by_peft_alone(arch: str, embeddings: bool, tie: bool, tmp_path: Path) -> None:
    base = saved(tiny_model(arch, tie), tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokens = len(tokenizer) + 2 * embeddings
    wrapped = add_lora(load(base, LABELS, num_tokens=tokens), lora(), "SEQ_CLS", train_embeddings=embeddings)
    names = moved(wrapped)
    assert len([n for n in names if "modules_to_save" in n]) == 1 + embeddings
    save_adapter(wrapped, trained_weights(wrapped), tmp_path / "adapter", tokenizer, str(base))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", str(base))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.score.weight"], trained_weights(wrapped)[_head(wrapped)])
    assert not [n for n in stored if "original_module" in n]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    if embeddings:
        plain.resize_token_embeddings(tokens)
    own = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    rows = [*ROWS, [5, tokens - 1, tokens - 2]]
    expected = scores_of(wrapped.eval(), rows)
    torch.testing.assert_close(one_by_one(own, rows), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(one_by_one(own.merge_and_unload(), rows), expected, atol=1e-5, rtol=0)


def _head(model: nn.Module) -> str:
    (name,) = (n for n, p in model.named_parameters() if "score" in n and p.requires_grad)
    return name


# --- what trains, and what it costs


@pytest.mark.parametrize(
    "trainable",
    [
        TrainableConfig(mode="all"),
        TrainableConfig(mode="last_layers", last_layers=0),
        TrainableConfig(mode="last_layers", last_layers=1),
        TrainableConfig(mode="patterns", patterns=[r"layers\.1\.|h\.1\."]),
        TrainableConfig(mode="lisa", lisa_layers=1),
    ],
    ids=["all", "last 0", "last 1", "patterns", "lisa"],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_head_is_trained_in_every_mode(arch: str, trainable: TrainableConfig) -> None:
    model = tiny_reward(arch)
    model.requires_grad_(False)
    apply_trainable(model, trainable)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in names
    assert moved(model) == names
    blocks = [any(p.requires_grad for p in b.parameters()) for b in find_blocks(model)]
    assert sum(blocks) == (2 if trainable.mode == "all" else 0 if names <= _outside(model) else 1)
    assert (trainable.mode == "all") == all(blocks)


def _outside(model: PreTrainedModel) -> set[str]:
    inside = {id(p) for p in find_blocks(model).parameters()}
    return {n for n, p in model.named_parameters() if id(p) not in inside}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_memory_is_counted_without_a_vocabulary_head(arch: str, labels: list[str] | None) -> None:
    plain = tiny_config(arch)
    config = reward_config(plain, labels)
    estimate = lambda lora, model=None, config=config: estimate_memory(
        config, model or ModelConfig(), lora, DeepspeedConfig(json={}), FP32, 1, 4, 16, on_cpu=True
    )  # fmt: skip
    model = tiny_reward(arch, labels)
    assert estimate(LoraConfig()).trainable_params == count_parameters(model).total
    adapted = count_parameters(add_lora(tiny_reward(arch, labels), lora(), "SEQ_CLS"))
    found = estimate(lora())
    assert (found.trainable_params, found.total_params) == adapted
    last = ModelConfig(trainable=TrainableConfig(mode="last_layers", last_layers=1))
    apply_trainable(model, last.trainable)
    assert estimate(LoraConfig(), last).trainable_params == count_parameters(model).trainable
    # 4 sequences of 16 positions of width 32, and their gradient
    assert estimate(LoraConfig()).head == 2 * 4 * (4 * 16 * 32)
    policy = estimate(LoraConfig(), config=plain)
    # the output head (tied in GPT-2 by nothing here) against one row per label
    vocab = plain.vocab_size
    assert policy.total_params - estimate(LoraConfig()).total_params == 32 * (vocab - len(labels or [None]))
    assert policy.activations == estimate(LoraConfig()).activations


def test_the_scale_of_scores_is_set_anew_each_time() -> None:
    config = tiny_config("llama")
    set_score_scale(config, ScoreScale(0.5, -3.0))
    assert score_scale(config) == score_scale(type(config)(**config.to_dict())) == (0.5, -3.0), (
        "as config.json keeps it"
    )
    set_score_scale(config, ScoreScale())
    assert score_scale(config) == (1.0, 0.0)
