"""The models of PPO: what starts from what, hydra against models that stand alone, saving, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, OPTConfig

from rlhf_cli.assemble import pretrained_text
from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.errors import ModelError
from rlhf_cli.models.head import enable_loss
from rlhf_cli.models.load import load_policy
from rlhf_cli.models.lora import add_lora, load_adapter
from rlhf_cli.models.reward import enable_scores, load_reward_model
from rlhf_cli.models.scratch import make_config, new_model
from rlhf_cli.ppo.critic_origin import find_critic
from rlhf_cli.ppo.models import check_ptx
from rlhf_cli.ppo.plan import plan_run
from rlhf_cli.schema import ArchConfig, LoadedModelConfig, PpoConfig
from tests.ppo_model_cases import train_plain
from tests.ppo_models import (
    change_manifest,
    ppo_config,
    random_texts,
    write_adapter_run,
    write_policy_run,
    write_reward_run,
)
from tests.reward_models import write_encoder, write_run
from tests.tiny_models import tiny_config, tiny_tokenizer

pytestmark = pytest.mark.distributed
CASES = "tests.ppo_model_cases:"
LORA = {"enabled": True, "r": 4}
FP32 = torch.float32
SLOW = pytest.mark.slow
PLACES = [(1, 2), pytest.param(1, 3, marks=SLOW), pytest.param(2, 2, marks=SLOW), (2, 3)]


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[n] - b[n]).max()) for n in a)


def assert_same_training(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Up to rounding. A gradient near zero, which one element in some thousands has, is magnified by Adam."""
    assert difference(a, b) < 1.5e-6
    assert np.quantile(np.concatenate([np.abs(a[n] - b[n]).ravel() for n in a]), 0.999) < 2e-7


def stand_alone(policy: Path, adapter: Path, config: PpoConfig) -> tuple[Any, Any]:
    """Policy and critic as models of their own: each loads its base, with the adapter that hydra gives it."""
    settings, base = LoadedModelConfig(path=str(policy)), policy / "model"
    actor = add_lora(load_policy(settings, base, FP32), config.lora, seed=config.train.seed)
    enable_loss(actor)
    critic = load_adapter(load_reward_model(settings, base, FP32, None, 0), adapter / "model", trainable=True)
    enable_scores(critic)
    return actor, critic


@pytest.mark.parametrize(("world", "stage"), PLACES)
def test_hydra_equals_models_that_stand_alone(run_on_ranks: Any, tmp_path: Path, world: int, stage: int) -> None:
    policy = write_policy_run(tmp_path / "sft")
    adapter = write_adapter_run(tmp_path / "rm", policy, dropout=0.3)
    sources = [{"path": str(adapter)}]
    hydra = ppo_config(policy, sources, stage, lora=LORA, sharing="hydra", optim={"weight_decay": 0.1})
    separate = ppo_config(policy, sources, stage, lora=LORA, optim={"weight_decay": 0.1})
    run = lambda config, name: run_on_ranks(
        world, f"{CASES}open_train_read", run_dir=str(tmp_path / name), config=config, steps=3, skip_policy_at=1
    )
    together, apart = run(hydra, "hydra"), run(separate, "separate")
    for rank in range(world):
        for found in (together, apart):
            before, _, after = found[rank]
            np.testing.assert_array_equal(before["policy"], before["reference"])
            np.testing.assert_array_equal(before["reference"], after["reference"])
            np.testing.assert_array_equal(before["scores"], after["scores"])
            assert np.abs(after["policy"] - before["policy"]).max() > 1e-3
            assert np.abs(after["values"] - before["values"]).max() > 1e-3
        # The same arithmetic on the same weights: bit for bit.
        for name in ("policy", "reference", "values", "scores", "generating"):
            np.testing.assert_array_equal(together[rank][0][name], apart[rank][0][name])
    for name in ("policy", "critic"):
        assert difference(together[0][1][name], apart[0][1][name]) == 0.0
    # Against two plain AdamWs, one of which skips the policy's second step.
    actor, critic = stand_alone(policy, adapter, hydra)
    for name, model, skip in (("policy", actor, 1), ("critic", critic.eval(), None)):
        expected = train_plain(model, name, 3, skip, decay=0.1)
        assert_same_training(together[0][1][name], expected)


@pytest.mark.parametrize("arch", ["gpt2", pytest.param("gpt_neox", marks=SLOW), pytest.param("qwen3", marks=SLOW)])
def test_hydra_of_other_architectures(run_on_ranks: Any, tmp_path: Path, arch: str) -> None:
    policy = write_policy_run(tmp_path / "sft", arch, dropout=0.5, tie=arch == "gpt2")
    adapter = write_adapter_run(tmp_path / "rm", policy)
    more: dict[str, Any] = {"lora": LORA, "model": {"gradient_checkpointing": True}}
    results = []
    for sharing in ("hydra", "separate"):
        config = ppo_config(policy, [{"path": str(adapter)}], 3, sharing=sharing, **more)
        case = {"run_dir": str(tmp_path / sharing), "config": config, "steps": 2}
        results.append(run_on_ranks(2 if arch == "gpt2" else 1, f"{CASES}open_train_read", **case)[0])
    for name in ("policy", "reference", "values", "scores"):
        np.testing.assert_array_equal(results[0][0][name], results[1][0][name])
    for name in ("policy", "critic"):
        assert difference(results[0][1][name], results[1][1][name]) == 0.0


def test_hydra_in_bf16(run_on_ranks: Any, tmp_path: Path) -> None:
    policy = write_policy_run(tmp_path / "sft")
    adapter = write_adapter_run(tmp_path / "rm", policy, labels=["sad", "happy"])
    source = {"type": "classifier", "label": 1, "path": str(adapter), "dtype": "bf16"}
    results = []
    for sharing in ("hydra", "separate"):
        config = ppo_config(policy, [source], 3, lora=LORA, sharing=sharing, model={"dtype": "bf16"})
        results.append(
            run_on_ranks(2, f"{CASES}open_train_read", run_dir=str(tmp_path / sharing), config=config, steps=2)[0]
        )
    before, _, after = results[0]
    np.testing.assert_array_equal(before["policy"], before["reference"])
    np.testing.assert_array_equal(before["reference"], after["reference"])
    for name in ("policy", "reference", "scores"):
        np.testing.assert_array_equal(before[name], results[1][0][name])
    np.testing.assert_array_equal(before["values"], results[1][0]["values"])  # the same fresh head


def test_a_whole_reward_model_beside_a_shared_one(run_on_ranks: Any, tmp_path: Path) -> None:
    """A gold model that is only watched, before the adapter: it has weights of its own, and the critic is the adapter's
    all the same."""
    policy, gold = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "gold")
    adapter = write_adapter_run(tmp_path / "rm", policy)
    read = lambda sources, name: run_on_ranks(
        2, f"{CASES}open_train_read", run_dir=str(tmp_path / name), steps=1,
        config=ppo_config(policy, sources, 3, lora=LORA, sharing="hydra", critic="reward", frozen="offload"),
    )[0]  # fmt: skip
    watched = {"path": str(gold), "weight": 0.0, "name": "gold"}
    alone, beside = read([{"path": str(adapter)}], "alone"), read([watched, {"path": str(adapter)}], "beside")
    for name in ("policy", "values", "scores"):
        for when in (0, 2):
            np.testing.assert_array_equal(alone[when][name], beside[when][name])
    counted = read([watched | {"weight": 1.0}, {"path": str(adapter)}], "counted")
    expected = alone[0]["scores"] + plain_readings(policy, gold)["scores"]
    np.testing.assert_allclose(counted[0]["scores"], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("world", "stage", "home"), [(1, 2, "offload"), (2, 2, "shard"), (2, 3, "keep"), (2, 3, "offload")]
)
def test_full_models_and_where_frozen_ones_are_kept(
    run_on_ranks: Any, tmp_path: Path, world: int, stage: int, home: str
) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    config = ppo_config(policy, [{"path": str(reward)}], stage, frozen=home)
    found = run_on_ranks(world, f"{CASES}open_train_read", run_dir=str(tmp_path / "ppo"), config=config, steps=1)
    expected = plain_readings(policy, reward)
    for before, _, after in found:
        np.testing.assert_array_equal(before["policy"], before["reference"])
        np.testing.assert_array_equal(before["reference"], after["reference"])
        np.testing.assert_array_equal(before["scores"], after["scores"])
        assert np.abs(after["policy"] - before["policy"]).max() > 1e-3
        for name in expected:
            np.testing.assert_allclose(before[name], expected[name], atol=2e-6)


def plain_readings(policy: Path, reward: Path) -> dict[str, np.ndarray]:
    """By transformers alone, one text at a time."""
    actor = AutoModelForCausalLM.from_pretrained(policy / "model")
    judge = AutoModelForSequenceClassification.from_pretrained(reward / "model")
    prompts, responses = random_texts(seed=1)
    logprobs = np.zeros((len(prompts), max(map(len, responses))), np.float32)
    values, scores = np.zeros_like(logprobs), []
    end = AutoTokenizer.from_pretrained(reward / "model").eos_token_id
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
            rows = actor(input_ids=ids).logits[0].log_softmax(-1)
            for t, token in enumerate(response):
                logprobs[i, t] = rows[len(prompt) - 1 + t, int(token)]
                values[i, t] = judge(input_ids=ids[:, : len(prompt) + t]).logits[0, 0]
            scores.append(float(judge(input_ids=torch.cat([ids, torch.tensor([[end]])], 1)).logits[0, 0]))
    return {"policy": logprobs, "values": values, "scores": np.array(scores[:4])}


def test_training_goes_as_with_plain_adamw(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    trainable = {"mode": "last_layers", "last_layers": 1}
    config = ppo_config(policy, [{"path": str(reward)}], 2, model={"trainable": trainable}, critic_lr=5e-3)
    _, weights, _ = run_on_ranks(1, f"{CASES}open_train_read", run_dir=str(tmp_path / "ppo"), config=config, steps=2)[0]
    actor = load_policy(LoadedModelConfig(), policy / "model", FP32)
    critic = load_reward_model(LoadedModelConfig(), reward / "model", FP32, None, 0)
    enable_loss(actor)
    enable_scores(critic)
    for name, model in (("policy", actor), ("critic", critic)):
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1." in key or key in ("model.norm.weight", "score.weight"))
        assert_same_training(weights[name], train_plain(model, name, 2))


@pytest.mark.parametrize(("stage", "lora"), [(2, False), (3, True)])
def test_saved_models_are_what_was_trained(run_on_ranks: Any, tmp_path: Path, stage: int, lora: bool) -> None:
    policy = write_policy_run(tmp_path / "sft", "gpt2", dropout=0.1, tie=True)
    reward = write_reward_run(tmp_path / "rm", "gpt2")
    run_dir = tmp_path / "ppo"
    config = ppo_config(policy, [{"path": str(reward)}], stage, lora=LORA if lora else {}, ema=0.8)
    weights, averages, readings, output = run_on_ranks(
        2, f"{CASES}open_train_save", run_dir=str(run_dir), config=config
    )[0]
    assert output == {
        "kind": "adapter" if lora else "policy", "task": "causal_lm", "path": "model",
        "format": "peft" if lora else "hf",
    }  # fmt: skip
    ids = torch.arange(3, 12)[None]
    causal = lambda name: _loaded(AutoModelForCausalLM, run_dir / name, policy / "model" if lora else None)
    last, final = causal("last_policy"), causal("model")
    np.testing.assert_allclose(last(input_ids=ids).logits.numpy(), readings["generating"], atol=1e-5)
    assert np.abs(final(input_ids=ids).logits.numpy() - readings["generating"]).max() > 1e-3
    named = dict(final.named_parameters())
    assert difference(averages, {n: named[n].numpy() for n in averages}) == 0.0
    critic = _loaded(AutoModelForSequenceClassification, run_dir / "critic", reward / "model" if lora else None)
    named = dict(critic.named_parameters())
    saved = {n: named[n].numpy() for n in weights["critic"]}
    assert difference(weights["critic"], saved) == 0.0
    assert len(AutoTokenizer.from_pretrained(run_dir / "critic")) == len(
        AutoTokenizer.from_pretrained(run_dir / "model")
    )
    if not lora:  # what it was trained without, others may want
        assert json.loads((run_dir / "model" / "config.json").read_text())["resid_pdrop"] == 0.1


def _loaded(auto: Any, folder: Path, base: Path | None) -> Any:
    """Frozen, in evaluation mode. base: of an adapter."""
    if base is None:
        return auto.from_pretrained(folder).eval().requires_grad_(False)
    more = {"num_labels": 1} if "Sequence" in auto.__name__ else {}
    return PeftModel.from_pretrained(auto.from_pretrained(base, **more), str(folder)).eval().requires_grad_(False)


def test_best_weights_become_the_result(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    config = ppo_config(policy, [{"path": str(reward)}], 3, advantage="rloo", ema=0.9)
    run_on_ranks(2, f"{CASES}open_train_save", run_dir=str(tmp_path / "ppo"), config=config, best=True)
    stored = lambda folder: load_file(folder / "model.safetensors")
    first, final, last = (stored(p) for p in (policy / "model", tmp_path / "ppo/model", tmp_path / "ppo/last_policy"))
    assert all(torch.equal(first[n], final[n]) for n in first)
    assert all(not torch.equal(first[n], last[n]) for n in first)
    assert not (tmp_path / "ppo" / "critic").exists()  # rloo has none


def test_average_is_that_of_the_weights_after_each_step(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    history = [load_file(policy / "model" / "model.safetensors")]
    config = ppo_config(policy, [{"path": str(reward)}], 3, advantage="rloo", ema=0.7)
    for steps in (1, 2):
        run_dir = str(tmp_path / f"ppo{steps}")
        weights, averages, *_ = run_on_ranks(2, f"{CASES}open_train_save", run_dir=run_dir, config=config, steps=steps)[
            0
        ]
        history.append({n: torch.from_numpy(w) for n, w in weights["policy"].items()})
        assert averages.keys() == history[0].keys()
    for name, found in averages.items():
        first, *others = (weights[name].double() for weights in history)
        for weights in others:
            first = 0.7 * first + 0.3 * weights
        np.testing.assert_allclose(found, first.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("world", "stage", "other_world", "other_stage"),
    [(1, 2, 1, 2), (2, 3, 2, 3), pytest.param(2, 3, 1, 2, marks=SLOW), pytest.param(1, 1, 2, 3, marks=SLOW)],
)
def test_resume_of_both_engines_and_the_average(
    run_on_ranks: Any, tmp_path: Path, world: int, stage: int, other_world: int, other_stage: int
) -> None:
    policy = write_policy_run(tmp_path / "sft")
    adapter = write_adapter_run(tmp_path / "rm", policy)
    settings: dict[str, Any] = {"lora": LORA, "sharing": "hydra", "ema": 0.9, "critic": "policy"}
    config = lambda stage: ppo_config(policy, [{"path": str(adapter)}], stage, **settings)
    run_dir = str(tmp_path / "ppo")
    whole = run_on_ranks(world, f"{CASES}train_and_checkpoint", run_dir=run_dir, config=config(stage))[0]
    again = run_on_ranks(other_world, f"{CASES}resume", run_dir=run_dir, config=config(other_stage))[0]
    allowed = 0.0 if (world, stage) == (other_world, other_stage) else 2e-6
    for name in ("policy", "critic"):
        assert difference(whole[0][name], again[0][name]) <= allowed
    assert difference(whole[1], again[1]) <= allowed


# --- what starts from what, and what is refused


def refused(run_on_ranks: Any, tmp_path: Path, config: PpoConfig) -> str:
    message: str = run_on_ranks(1, f"{CASES}refused", run_dir=str(tmp_path / "ppo"), config=config)[0]
    return message


def with_other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(found))


def test_hydra_needs_the_adapters_own_base(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, other = write_policy_run(tmp_path / "sft"), write_policy_run(tmp_path / "other", seed=1)
    adapter = write_adapter_run(tmp_path / "rm", policy)
    config = lambda base: ppo_config(
        base, [{"path": str(adapter)}], lora=LORA, sharing="hydra", critic="policy"
    )  # fmt: skip
    told = refused(run_on_ranks, tmp_path, config(other))
    assert "reward.sources[0].path" in told
    assert "trained on the policy's own weights" in told
    # Without the run's manifest the weights themselves are compared.
    (adapter / "manifest.json").unlink()
    source = [{"path": str(adapter / "model")}]
    alone = ppo_config(other, source, lora=LORA, sharing="hydra", critic="policy")
    assert "trained on the policy's own weights" in refused(run_on_ranks, tmp_path, alone)
    alone.model.path = str(policy)
    assert refused(run_on_ranks, tmp_path, alone) == "no error"


def test_hydra_refuses_a_base_that_has_changed(run_on_ranks: Any, tmp_path: Path) -> None:
    policy = write_policy_run(tmp_path / "sft")
    adapter = write_adapter_run(tmp_path / "rm", policy)
    weights = load_file(policy / "model" / "model.safetensors")
    save_file({n: t + 1e-3 for n, t in weights.items()}, policy / "model" / "model.safetensors", {"format": "pt"})
    config = ppo_config(policy, [{"path": str(adapter)}], lora=LORA, sharing="hydra", critic="policy")
    assert "trained on the policy's own weights" in refused(run_on_ranks, tmp_path, config)


def test_hydra_refuses_another_precision_and_tokenizer(run_on_ranks: Any, tmp_path: Path) -> None:
    policy = write_policy_run(tmp_path / "sft")
    adapter = write_adapter_run(tmp_path / "rm", policy)
    settings: dict[str, Any] = {"lora": LORA, "sharing": "hydra", "critic": "policy"}
    config = ppo_config(policy, [{"path": str(adapter), "dtype": "bf16"}], **settings)
    assert "reward.sources[0].dtype: bf16, but" in refused(run_on_ranks, tmp_path, config)
    with_other_tokenizer(adapter / "model")
    config = ppo_config(policy, [{"path": str(adapter)}], **settings)
    assert "has another tokenizer than the policy" in refused(run_on_ranks, tmp_path, config)


def test_reference_and_critic_read_the_policys_tokens(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, other = write_policy_run(tmp_path / "sft"), write_policy_run(tmp_path / "other")
    reward = write_reward_run(tmp_path / "rm")
    with_other_tokenizer(other / "model")
    told = refused(run_on_ranks, tmp_path, ppo_config(policy, [{"path": str(reward)}], ref=str(other)))
    assert told.startswith(f"ppo.ref: {other} has another tokenizer than the policy")
    told = refused(run_on_ranks, tmp_path, ppo_config(policy, [{"path": str(reward)}], critic=str(other)))
    assert told.startswith(f"ppo.critic: {other} has another tokenizer than the policy")
    with_other_tokenizer(reward / "model")
    told = refused(run_on_ranks, tmp_path, ppo_config(policy, [{"path": str(reward)}], critic="reward"))
    assert told.startswith("ppo.critic: reward is not possible")
    assert "another tokenizer" in told
    # auto falls back to the policy then.
    assert refused(run_on_ranks, tmp_path, ppo_config(policy, [{"path": str(reward)}])) == "no error"


def test_reference_critic_and_hydra_read_the_policys_template(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, other = write_policy_run(tmp_path / "sft"), change_manifest(write_policy_run(tmp_path / "o"), template="hh")
    reward = change_manifest(write_reward_run(tmp_path / "rm"), template="hh")
    adapter = change_manifest(write_adapter_run(tmp_path / "rma", policy), template="hh")
    source, hydra = [{"path": str(reward)}], {"lora": LORA, "sharing": "hydra", "critic": "policy"}
    for config, said in (
        (ppo_config(policy, source, ref=str(other)), f"ppo.ref: {other} was trained with the template hh"),
        (ppo_config(policy, source, critic="reward"), f"{reward} was trained with the template hh"),
        (ppo_config(policy, source, critic=str(reward)), f"ppo.critic: {reward} was trained with the template hh"),
        (ppo_config(policy, [{"path": str(adapter)}], **hydra), f"{adapter} was trained with the template hh"),
    ):
        told = refused(run_on_ranks, tmp_path, config)
        assert said in told
        assert "run the stage that made it with the template none first" in told
    # auto falls back to the policy, and a template with the same text is the same one.
    assert refused(run_on_ranks, tmp_path, ppo_config(policy, source)) == "no error"
    change_manifest(other, template="tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(other / "model")
    tokenizer.chat_template = TEMPLATES["none"].jinja
    tokenizer.save_pretrained(other / "model")
    assert refused(run_on_ranks, tmp_path, ppo_config(policy, source, ref=str(other))) == "no error"


def test_which_critic(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    adapter = write_adapter_run(tmp_path / "rma", policy)
    labelled = write_reward_run(tmp_path / "mood", labels=["sad", "happy"])
    encoder = tmp_path / "bert"
    write_encoder(encoder / "model", ["score"])
    write_run(encoder)
    plain = {"path": str(encoder / "model")}
    text = pretrained_text(LoadedModelConfig(path=str(policy)), "none")
    critic = lambda *sources, **more: find_critic(ppo_config(policy, [*sources], **more), text, str(policy / "model"))
    assert critic({"path": str(reward)})[0] == str(reward / "model")
    assert critic({"path": str(adapter)})[0] == str(policy / "model")  # an adapter does not make a full critic
    assert "is an adapter; merge it first" in critic({"path": str(adapter)}).about
    assert critic({"path": str(adapter)}, lora=LORA)[:3] == (
        str((policy / "model").resolve()),
        None,
        str(adapter / "model"),
    )
    assert critic({"path": str(adapter)}, {"path": str(reward)})[0] == str(reward / "model")  # the first that fits
    assert critic({"path": str(labelled), "label": "happy"})[0] == str(policy / "model")
    assert "has 2 labels" in critic({"path": str(labelled), "label": "happy"}).about
    assert "cannot become a critic" in critic(plain).about
    assert critic({"path": str(reward)}, critic="policy")[0] == str(policy / "model")
    assert critic({"path": str(adapter)}, critic=str(reward))[0] == str(reward / "model")
    assert critic({"path": str(reward)}, lora=LORA, sharing="hydra")[0] == str(policy / "model")
    assert critic({"path": str(reward)}, advantage="rloo") is None


OFFSET = {"mean": 40.0, "std": 2.5}  # a reward model is trained on differences, so its scores may lie anywhere


@pytest.mark.parametrize(("world", "stage"), [(1, 2), pytest.param(2, 3, marks=SLOW)])
def test_a_critic_starts_on_the_scale_that_is_learnt(run_on_ranks: Any, tmp_path: Path, world: int, stage: int) -> None:
    policy = write_policy_run(tmp_path / "sft")
    reward = change_manifest(write_reward_run(tmp_path / "rm"), reward=OFFSET)
    sources, normal = [{"path": str(reward), "weight": 0.5}], {"normalize": True}
    run = lambda name, critic, **more: run_on_ranks(
        world, f"{CASES}values_at_the_end", run_dir=str(tmp_path / name), save=True,
        config=ppo_config(policy, sources, stage, critic=critic, **more),
    )[0]  # fmt: skip
    values, scores = run("ppo", "reward", reward=normal)
    assert abs(scores.mean() + 8) < 1  # 0.5 (0 - 40) / 2.5
    np.testing.assert_allclose(values, scores, rtol=1e-5)
    assert json.loads((tmp_path / "ppo/critic/config.json").read_text())["score_scale"] == [0.2, -8.0]
    for name, critic, more in (
        ("by path", str(reward), {"reward": normal}),
        ("handed on", str(tmp_path / "ppo" / "critic"), {"reward": normal}),
        ("weighted", "reward", {}),
    ):
        values, scores = run(name, critic, **more)
        np.testing.assert_allclose(values, scores, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("sharing", ["hydra", "separate"])
def test_a_critic_from_an_adapter_starts_on_the_scale_that_is_learnt(
    run_on_ranks: Any, tmp_path: Path, sharing: str
) -> None:
    policy = write_policy_run(tmp_path / "sft")
    adapter = change_manifest(write_adapter_run(tmp_path / "rm", policy), reward=OFFSET)
    config = ppo_config(policy, [{"path": str(adapter)}], lora=LORA, sharing=sharing, reward={"normalize": True})
    values, scores = run_on_ranks(1, f"{CASES}values_at_the_end", run_dir=str(tmp_path / "ppo"), config=config)[0]
    assert abs(scores.mean() + 16) < 1
    np.testing.assert_allclose(values, scores, rtol=1e-5)


def test_no_critic_from_a_reward_model_whose_moments_are_not_known_yet(tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    config = ppo_config(policy, [{"path": str(reward)}], reward={"normalize": True, "moments": "running"})
    found = find_critic(config, None, str(policy / "model"))
    assert found is not None
    assert found.path == str(policy / "model")
    assert "running moments" in found.about


def test_too_long_for_the_models(run_on_ranks: Any, tmp_path: Path) -> None:
    policy, reward = write_policy_run(tmp_path / "sft"), write_reward_run(tmp_path / "rm")
    config = ppo_config(policy, [{"path": str(reward)}], generation={"max_new_tokens": 1020})
    told = refused(run_on_ranks, tmp_path, config)
    assert "16 + 1020 = 1036 is more than the 1024 positions" in told
    text = {"coef": 1.0, "data": {"path": "text.txt", "max_length": 1025}}
    told = refused(run_on_ranks, tmp_path, ppo_config(policy, [{"path": str(reward)}], ptx=text))
    assert told.startswith("ppo.ptx.data.max_length: 1025 is more than the 1024 positions of the policy")


def test_text_is_packed_for_policies_that_keep_it_apart(tmp_path: Path) -> None:
    text = {"coef": 1.0, "data": {"path": "text.txt", "packing": True}}
    config = ppo_config(tmp_path, [{"path": str(tmp_path)}], ptx=text)
    check_ptx(config, tiny_config("gpt2"), 2048)
    with pytest.raises(ModelError, match=r"^ppo\.ptx\.data\.packing: opt models"):
        check_ptx(config, OPTConfig(), 2048)


# --- memory


@pytest.mark.slow
def test_peaks_are_near_the_plan_and_hydra_saves(run_on_ranks: Any, tmp_path: Path) -> None:
    shape = ArchConfig(type="llama", hidden_size=512, num_layers=8, num_heads=8, intermediate_size=1408)
    model = new_model(make_config(shape, tiny_tokenizer(), 128), FP32, 0)  # 98 MiB
    policy = write_policy_run(tmp_path / "sft", model=model)
    reward = write_reward_run(tmp_path / "rm", config=model.config)
    adapter = write_adapter_run(tmp_path / "rma", policy)
    more: dict[str, Any] = {
        "data": {"max_prompt_length": 32}, "generation": {"max_new_tokens": 32, "batch_size": 4},
        "rollout_batch_size": 8,
    }  # fmt: skip
    separate = ppo_config(policy, [{"path": str(reward)}], **more)
    hydra = ppo_config(policy, [{"path": str(adapter)}], lora={"enabled": True, "r": 8}, sharing="hydra", **more)
    most = {}
    text = pretrained_text(LoadedModelConfig(path=str(policy)), "none")
    for name, config in (("hydra", hydra), ("separate", separate)):
        config.reward.batch_size = 4
        run_dir = str(tmp_path / name)
        # The second time: libraries and their workspaces are there already.
        found = [run_on_ranks(1, f"{CASES}peaks", run_dir=f"{run_dir}{i}", config=config)[0] for i in range(2)][1]
        planned = plan_run(config, text, 32, 1, for_gpu=False)
        most[name] = max(found.values())
        mib = lambda size: size / 2**20
        # Pages of mapped weight files count as resident, too: up to 98 MiB of each model.
        assert 0.8 * mib(planned.total("train")) < found["train"] < 1.2 * mib(planned.total("train")) + 110
        assert found["at rest"] < 1.2 * mib(sum(planned.rest.values())) + 110
    assert most["hydra"] < most["separate"] / 3
