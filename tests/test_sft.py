"""The stage as a whole, in pools of real ranks: same numbers on every layout, the right parameters, usable results."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli import assemble
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.distributed import Ranks
from rlhf_cli.runtime.engine import Engine, make_engine
from rlhf_cli.runtime.metrics import read_metrics
from tests.stage_cases import run_sft, words, write_dialogues

RUN = "tests.stage_cases:run_sft"
Runner = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl")


@pytest.fixture(scope="module")
def base(run_on_ranks: Runner, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to start other runs from."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    run_on_ranks(1, RUN, run_dir=str(run_dir), overrides=words(data, train__max_steps=3))
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


# --- the same numbers on every layout


LAYOUTS = [
    (1, {"train__micro_batch_size": 8}),
    (1, {"train__micro_batch_size": 2}),
    (2, {"deepspeed": "zero2"}),
    (2, {"deepspeed": "zero3"}),
    (2, {"deepspeed": "zero0", "train__micro_batch_size": 1}),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_losses_do_not_depend_on_the_layout(
    run_on_ranks: Runner, data: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    found = {}
    for packing in ("false", "true"):
        layouts = LAYOUTS[:1] if (packing, dtype) == ("false", "bf16") else LAYOUTS  # fp32 has told the rest
        for number, (world_size, options) in enumerate(layouts):
            run_dir = tmp_path / f"{packing}-{number}"
            overrides = words(data, data__packing=packing, model__dtype=dtype, optim__lr=0.001, **options)
            run_on_ranks(world_size, RUN, run_dir=str(run_dir), overrides=overrides)
            found[packing, number] = losses(run_dir)
    reference = found["false", 0]
    assert len(reference) == 12
    assert reference[0] - reference[-1] > 0.1, "it must have learned something for this to mean anything"
    for key, values in found.items():
        assert values == pytest.approx(reference, abs=tolerance), key


@pytest.mark.slow
@pytest.mark.distributed
def test_eight_ranks_zero3_bf16(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    options = {"deepspeed": "zero3", "model__dtype": "bf16", "train__max_steps": 4, "optim__lr": 0.001}
    eight = words(data, train__micro_batch_size=1, **options)
    run_on_ranks(8, RUN, timeout=300.0, run_dir=str(tmp_path / "8"), overrides=eight)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "1"), overrides=words(data, **options))
    assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "1"), abs=2e-3)


def test_a_run_repeats_itself_bitwise(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_on_ranks(1, RUN, run_dir=str(tmp_path / name), overrides=words(data, train__seed=seed, train__max_steps=3))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if a[k].dim() > 1)


# --- resuming


@pytest.mark.parametrize(
    "options", [{"model__arch__dropout": 0.1, "model__arch__type": "gpt2"}, {"data__packing": "true"}]
)
def test_a_run_that_goes_on_equals_one_that_never_stopped(
    run_on_ranks: Runner, data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Dropout included: its random numbers are part of the state. A constant schedule: others look at max_steps."""
    options |= {"optim__schedule": "constant", "optim__warmup_ratio": 0, "train__save_every": 5}
    whole = words(data, train__max_steps=9, **options)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "whole"), overrides=whole)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "parts"), overrides=words(data, train__max_steps=5, **options))
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "parts"), overrides=whole)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "parts")]
    assert steps == [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "whole")]
    assert [step for step, _ in steps] == list(range(1, 10))


@pytest.mark.distributed
def test_resuming_on_other_ranks_and_another_stage(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    """Two parameter groups (decay, none) with real moments go 2 ranks ZeRO-3 -> 1 rank ZeRO-2 -> 2 ranks ZeRO-1."""
    options = {"optim__schedule": "constant", "optim__warmup_ratio": 0, "train__save_every": 4, "optim__lr": 0.002}
    legs = [(2, "zero3", 4), (1, "zero2", 8), (2, "zero1", 12)]
    for world_size, stage, steps in legs:
        overrides = words(data, deepspeed=stage, train__max_steps=steps, **options)
        run_on_ranks(world_size, RUN, run_dir=str(tmp_path / "moved"), overrides=overrides)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "still"), overrides=words(data, **options))
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "still"), abs=1e-5)
    moved, still = weights(tmp_path / "moved"), weights(tmp_path / "still")
    for name, value in still.items():
        torch.testing.assert_close(moved[name], value, atol=1e-5, rtol=0)


def test_other_data_on_resume_is_refused(run_on_ranks: Runner, tmp_path: Path) -> None:
    path = write_dialogues(tmp_path / "d.jsonl")
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=words(path, train__max_steps=2, train__save_every=1))
    write_dialogues(path, seed=1)
    with pytest.raises(AssertionError, match="the data has changed since"):
        run_on_ranks(
            1, RUN, run_dir=str(tmp_path / "r"), overrides=words(path, train__max_steps=4, train__save_every=1)
        )


# --- the right parameters


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def from_base(base: Path, data: Path, **more: Any) -> list[str]:
    kept = [w for w in words(data, **more) if not w.startswith(("model.init", "model.arch", "model.tokenizer"))]
    return [*kept, f"model.path={base}"]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_last_layers_change_and_nothing_else(
    run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path, stage: str
) -> None:
    options = {"model__trainable__mode": "last_layers", "model__trainable__last_layers": 1, "train__max_steps": 2}
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=from_base(base, data, deepspeed=stage, **options))
    after = weights(tmp_path / "r")
    last = {name for name in after if ".layers.3." in name or name == "model.norm.weight"}
    assert changed(weights(base), after) == last


def test_patterns_change_and_nothing_else(run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path) -> None:
    options = {
        "model__trainable__mode": "patterns",
        "model__trainable__patterns": r"['layers\.[02].*q_proj','lm_head']",
    }
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=from_base(base, data, train__max_steps=2, **options))
    names = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2)} | {"lm_head.weight"}
    assert changed(weights(base), weights(tmp_path / "r")) == names


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "stage"), [(1, "zero2"), (2, "zero3")])
def test_lisa_trains_the_drawn_blocks_and_resumes_exactly(
    run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path, world_size: int, stage: str
) -> None:
    from rlhf_cli.models.trainable import lisa_draw

    settings = {"mode": "lisa", "lisa_layers": 1, "lisa_interval": 2}
    options = {f"model__trainable__{k}": v for k, v in settings.items()}
    options |= {"deepspeed": stage, "optim__schedule": "constant", "optim__warmup_ratio": 0, "train__save_every": 3}
    whole = from_base(base, data, train__max_steps=6, **options)
    run_on_ranks(world_size, RUN, run_dir=str(tmp_path / "whole"), overrides=whole)
    drawn = {block for draw in range(3) for block in lisa_draw(4, 1, 0, draw)}
    assert drawn != set(range(4)), "some block must stay out for this to mean anything"
    after = weights(tmp_path / "whole")
    still = {name for name in after for block in set(range(4)) - drawn if f".layers.{block}." in name}
    assert changed(weights(base), after) == after.keys() - still
    # killed in the middle of an interval: blocks that are frozen now were trained before
    parts = from_base(base, data, train__max_steps=3, **options)
    run_on_ranks(world_size, RUN, run_dir=str(tmp_path / "parts"), overrides=parts)
    run_on_ranks(world_size, RUN, run_dir=str(tmp_path / "parts"), overrides=whole)
    assert not changed(after, weights(tmp_path / "parts"))


def engines_at_each_draw(ranks: Ranks, run_dir: str, overrides: list[str]) -> list[int]:
    """How many engines of DeepSpeed are in memory whenever LISA makes another."""
    made: list[Any] = []
    found = []

    def make(*args: Any) -> Engine:
        found.append(sum(inner() is not None for inner in made))
        engine = make_engine(*args)
        made.append(weakref.ref(engine.inner))
        return engine

    with mock.patch.object(assemble, "make_engine", make):
        run_sft(ranks, run_dir, overrides)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_lisa_keeps_one_engine(run_on_ranks: Runner, data: Path, tmp_path: Path, stage: str) -> None:
    options = {"mode": "lisa", "lisa_layers": 1, "lisa_interval": 1}
    overrides = words(
        data, deepspeed=stage, train__max_steps=6, **{f"model__trainable__{k}": v for k, v in options.items()}
    )
    (found,) = run_on_ranks(1, "tests.test_sft:engines_at_each_draw", run_dir=str(tmp_path / "r"), overrides=overrides)
    assert len(found) > 3, "LISA must have drawn other blocks for this to mean anything"
    assert set(found) == {0}, "the old engine's master weights and moments are still there"


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "stage"), [(1, "zero2"), (2, "zero3")])
def test_lora_saves_an_adapter_that_peft_loads(
    run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path, world_size: int, stage: str
) -> None:
    from peft import PeftModel

    overrides = from_base(base, data, lora="r16", deepspeed=stage, train__max_steps=4)
    run_on_ranks(world_size, RUN, run_dir=str(tmp_path / "r"), overrides=overrides)
    manifest = read_manifest(tmp_path / "r")
    assert (manifest["output"]["kind"], manifest["output"]["format"]) == ("adapter", "peft")
    adapter = load_file(tmp_path / "r" / "model" / "adapter_model.safetensors")
    assert adapter
    assert all(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    ids = torch.arange(3, 15).view(1, -1)
    before = model(ids).logits.detach()
    after = PeftModel.from_pretrained(model, tmp_path / "r" / "model")(ids).logits
    assert (after - before).abs().max() > 1e-3
    base_weights = load_file(base / "model" / "model.safetensors")
    for name, value in AutoModelForCausalLM.from_pretrained(base / "model").state_dict().items():
        assert torch.equal(base_weights[name], value)


# --- what a run leaves


def test_the_run_directory_loads_in_transformers_and_generates_the_same(
    run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path
) -> None:
    options = {"generation__num_prompts": 3, "generation__temperature": 0, "generation__max_new_tokens": 12}
    options |= {"data__validation_split_percentage": 20, "train__eval_every": 2, "train__max_steps": 4}
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=from_base(base, data, **options))
    samples = [json.loads(line) for line in (tmp_path / "r/samples/step_00000004.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "r" / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for sample in samples:
        ids = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("###Human")[0]
        assert text == sample["response"]
        prompt = sample["prompt"].removeprefix("###Human: ").removesuffix("###Assistant:")
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        assert chat == sample["prompt"]


def test_evaluation_is_the_mean_loss_per_token_of_the_saved_model(
    run_on_ranks: Runner, data: Path, tmp_path: Path
) -> None:
    """Recomputed from the saved model with full logits, row by row; the prompt's tokens count nothing."""
    options = {"data__validation_split_percentage": 25, "train__max_steps": 3}
    (figures,) = run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=words(data, **options))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "r" / "model")
    total, count = 0.0, 0
    for line in data.read_text().splitlines()[30:]:  # 25 % of 40 rows are the last ten
        row = json.loads(line)
        prompt = tokenizer(f"###Human: {row['prompt']}###Assistant:", add_special_tokens=False).input_ids
        response = [*tokenizer(f" {row['response']}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logprobs = model(torch.tensor([prompt + response])).logits.log_softmax(-1)[0]
        for i, token in enumerate(response):
            total -= logprobs[len(prompt) + i - 1, token].item()
        count += len(response)
    assert figures["eval_loss"] == pytest.approx(total / count, abs=1e-5)


def test_early_stopping_keeps_the_best_weights(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    """A far too large learning rate makes the loss rise again; the saved model is that of the best evaluation."""
    options = {"data__validation_split_percentage": 25, "train__eval_every": 1, "train__max_steps": 40}
    options |= {"train__early_stopping__patience": 2, "optim__schedule": "constant", "optim__lr": 0.3}
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=words(data, **options))
    curve = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "r")}
    best = min(curve, key=lambda step: curve[step])
    assert max(curve) == best + 2 < 40
    metrics = read_manifest(tmp_path / "r")["metrics"]
    assert (metrics["best_step"], metrics["eval_loss"]) == (best, curve[best])
    assert not list((tmp_path / "r" / "checkpoints").glob("best_*"))
    again = from_base(tmp_path / "r", data, **(options | {"train__max_steps": 1, "optim__lr": 1e-30}))
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "again"), overrides=again)
    (line,) = read_metrics(tmp_path / "again")
    assert line["eval_loss"] == pytest.approx(curve[best], abs=1e-5)


def test_the_manifest_tells_where_a_run_comes_from(
    run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path
) -> None:
    run_on_ranks(
        1, RUN, run_dir=str(tmp_path / "r"), overrides=from_base(base, data, train__max_steps=1, data__template="auto")
    )
    manifest = read_manifest(tmp_path / "r")
    assert manifest["status"] == "complete"
    assert manifest["template"] == "hh", "the template travels with the model"
    (parent,) = manifest["parents"]
    assert (parent["role"], parent["run_dir"]) == ("policy", str(base))
    assert len(parent["digest"]) == 64
    (info,) = manifest["data"]
    assert (info["rows"], info["kept"], info["dropped"]) == (40, 40, {})


def test_extra_tokens_survive_the_run(run_on_ranks: Runner, base: Path, data: Path, tmp_path: Path) -> None:
    overrides = [*from_base(base, data, train__max_steps=1), "model.tokenizer.extra_tokens=['    ','        ']"]
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=overrides)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "r" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    assert len(tokenizer("    ", add_special_tokens=False).input_ids) == 1
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_loss_that_is_no_number_fails_clearly(run_on_ranks: Runner, data: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no longer a number"):
        run_on_ranks(1, RUN, run_dir=str(tmp_path / "r"), overrides=words(data, optim__lr=1e30, optim__max_grad_norm=0))
