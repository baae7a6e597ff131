"""`rlhf rm` as a whole, in pools of real ranks: what it learns, what it says, what others make of its model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_cli.data.templates import TEMPLATES
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from tests.stage_cases import NOUNS, rm_words, words, write_dialogues, write_pairs

RUN = "tests.stage_cases:run_rm"
RUN_SFT = "tests.stage_cases:run_sft"
Runner = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows=320)


@pytest.fixture(scope="module")
def policy(run_on_ranks: Runner, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of sft whose tokenizer knows the words of the pairs."""
    run_dir = tmp_path_factory.mktemp("policy") / "run"
    overrides = words(
        pairs,
        model__tokenizer__train="word",
        data__validation_split_percentage=25,
        train__max_steps=20,
        optim__lr=0.003,
    )
    run_on_ranks(1, RUN_SFT, run_dir=str(run_dir), overrides=overrides)
    return run_dir


def from_policy(policy: Path, data: Path, **more: Any) -> list[str]:
    """Words of an rm run that starts from a policy."""
    kept = [w for w in rm_words(data, **more) if not w.startswith(("model.init", "model.arch", "model.tokenizer"))]
    return [*kept, f"model.path={policy}"]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def evaluation(run_dir: Path) -> dict[str, Any]:
    return json.loads(max((run_dir / "evaluation").glob("step_*.json")).read_text())


def row_scores(run_dir: Path) -> list[dict[str, Any]]:
    text = max((run_dir / "evaluation").glob("scores_*.jsonl")).read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- what it learns


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {"deepspeed": "zero2"}),
        (2, {"deepspeed": "zero3"}),
        (2, {"deepspeed": "zero3", "lora": "r16", "optim__lr": 0.01}),
    ],
)
def test_a_planted_preference_is_learnt_on_every_layout(
    run_on_ranks: Runner, policy: Path, pairs: Path, tmp_path: Path, world_size: int, options: dict[str, Any]
) -> None:
    overrides = from_policy(policy, pairs, train__max_steps=60, train__global_batch_size=16, **options)
    run_on_ranks(world_size, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    metrics = read_manifest(tmp_path / "run")["metrics"]
    assert metrics["eval_accuracy"] >= 0.95
    assert metrics["eval_chosen_mean"] > metrics["eval_rejected_mean"]


@pytest.mark.slow
def test_labels_flipped_at_random_teach_nothing(run_on_ranks: Runner, tmp_path: Path) -> None:
    """50 % within three standard errors: nothing of the evaluation rows leaks into training."""
    data = write_pairs(tmp_path / "flipped.jsonl", rows=600, flipped=1.0)
    overrides = rm_words(data, train__max_steps=80, train__global_batch_size=16, data__validation_split_percentage=40)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    metrics = read_manifest(tmp_path / "run")["metrics"]
    assert abs(metrics["eval_accuracy"] - 0.5) <= 3 * metrics["eval_accuracy_stderr"]
    assert metrics["accuracy"] > 0.5, "the training rows themselves are learnt by heart"


def write_gold(path: Path, rows: int, seed: int = 0) -> tuple[float, float]:
    """Pairs of texts whose gold score is a sum of word weights ~ N(0, 1), labels drawn Bradley-Terry from it.

    Returns (accuracy, NLL) of the gold scores on the last quarter, which nothing can beat beyond noise.
    """
    draw = np.random.default_rng(seed)
    names = [f"w{i:02d}" for i in range(24)]
    weights = draw.normal(size=len(names))
    weights = (weights - weights.mean()) / weights.std()
    lines, differences = [], []
    for _ in range(rows):
        sides = draw.integers(len(names), size=(2, 6))
        gold = weights[sides].sum(1) / math.sqrt(6)
        if draw.random() > 1 / (1 + math.exp(gold[1] - gold[0])):
            sides, gold = sides[::-1], gold[::-1]
        differences.append(gold[0] - gold[1])
        chosen, rejected = (" ".join(names[i] for i in side) for side in sides)
        lines.append(json.dumps({"chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    held_out = np.array(differences[-rows // 4 :])
    return float((held_out > 0).mean()), float(np.log1p(np.exp(-held_out)).mean())


@pytest.mark.slow
def test_bradley_terry_labels_are_learnt_up_to_the_oracle_and_no_further(run_on_ranks: Runner, tmp_path: Path) -> None:
    """With r ~ N(0, 1) the gold scores themselves reach 72.5 % and 0.540 on infinitely many pairs."""
    accuracy, nll = write_gold(tmp_path / "gold.jsonl", rows=4000)
    assert (accuracy, nll) == (pytest.approx(0.725, abs=0.045), pytest.approx(0.540, abs=0.045))
    overrides = rm_words(
        tmp_path / "gold.jsonl", train__max_steps=220, train__global_batch_size=64, train__micro_batch_size=64,
        optim__lr=0.004, model__arch__num_layers=2, data__max_length=16,
    )  # fmt: skip
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    metrics = read_manifest(tmp_path / "run")["metrics"]
    noise = 3 * metrics["eval_accuracy_stderr"]
    assert accuracy - 0.04 <= metrics["eval_accuracy"] <= accuracy + noise
    assert nll - 0.01 <= metrics["eval_loss"] <= nll + 0.04
    assert metrics["eval_ece"] < 0.06


def write_rankings(path: Path, rows: int = 160, seed: int = 0) -> Path:
    """Two to nine answers to a prompt, the more roses the better; equal counts are ties."""
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        answers, scores = [], []
        for _ in range(draw.randint(2, 9)):
            roses = draw.randint(0, 3)
            told = ["rose"] * roses + [draw.choice(NOUNS[:-1]) for _ in range(4 - roses)]
            draw.shuffle(told)
            answers.append(" ".join(told))
            scores.append(roses)
        lines.append(json.dumps({"prompt": f"tell of {draw.choice(NOUNS)}", "responses": answers, "scores": scores}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.distributed
def test_a_planted_ranking_is_recovered_and_layouts_agree(run_on_ranks: Runner, tmp_path: Path) -> None:
    data = write_rankings(tmp_path / "ranked.jsonl")
    found = []
    for world_size, stage in ((1, "zero2"), (2, "zero3")):
        run_dir = tmp_path / f"run{world_size}"
        overrides = rm_words(data, train__max_steps=40, deepspeed=stage, train__micro_batch_size=2, optim__lr=0.005)
        run_on_ranks(world_size, RUN, run_dir=str(run_dir), overrides=overrides)
        found.append(losses(run_dir))
        assert read_manifest(run_dir)["metrics"]["eval_accuracy"] > 0.95
        assert read_manifest(run_dir)["reward"]["type"] == "rankings"
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    # the order of scores is the order of ranks, row by row, where the model is sure
    row = max(row_scores(tmp_path / "run1"), key=lambda r: len(set(r["ranks"])))
    means = [np.mean([s for s, r in zip(row["scores"], row["ranks"], strict=True) if r == rank])
             for rank in sorted(set(row["ranks"]))]  # fmt: skip
    assert means == sorted(means, reverse=True)


def write_labels(path: Path, rows: int = 90) -> Path:
    """Three labels told by a noun, sorted by label as such files often are."""
    draw = random.Random(0)
    lines = []
    for label, noun in (("calm", "garden"), ("grim", "storm"), ("proud", "king")):
        for _ in range(rows // 3):
            told = [noun, *draw.choices(["sees", "takes", "loves", "letter", "horse"], k=draw.randint(2, 7))]
            draw.shuffle(told)
            lines.append(json.dumps({"sample": " ".join(told), "sentiment": label}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_labels_are_learnt_and_kept_with_their_names(run_on_ranks: Runner, tmp_path: Path) -> None:
    data = write_labels(tmp_path / "labels.jsonl")
    overrides = rm_words(data, train__max_steps=40, rm__class_weights="balanced", optim__lr=0.005)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    manifest = read_manifest(tmp_path / "run")
    assert manifest["metrics"]["eval_accuracy"] >= 0.95
    assert manifest["metrics"]["eval_majority"] == pytest.approx(1 / 3)  # drawn class by class
    assert manifest["reward"]["labels"] == ["calm", "grim", "proud"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "calm", 1: "grim", 2: "proud"}
    # the moments of log p(grim), from the logits of the evaluation rows
    logits = torch.tensor([row["logits"] for row in row_scores(tmp_path / "run")])
    log_prob = torch.log_softmax(logits.double(), -1)[:, 1]
    stored = manifest["reward"]["by_label"]["grim"]["log_prob"]
    assert stored["mean"] == pytest.approx(log_prob.mean().item())
    assert stored["std"] == pytest.approx(log_prob.std(correction=0).item())


# --- what others make of it


def texts_of(data: Path, template: str) -> list[tuple[str, str]]:
    """(chosen, rejected) of each row as the model reads them, written by transformers' chat template."""
    tokenizer = AutoTokenizer.from_pretrained(data)  # the saved model's own
    found = []
    for line in Path(template).read_text().splitlines():
        row = json.loads(line)
        sides = []
        for side in ("chosen", "rejected"):
            chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            sides.append(tokenizer.apply_chat_template(chat, tokenize=False) + tokenizer.eos_token)
        found.append((sides[0], sides[1]))
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_transformers_alone_finds_the_same_scores_and_accuracy(
    run_on_ranks: Runner, pairs: Path, tmp_path: Path, arch: str
) -> None:
    overrides = rm_words(pairs, train__max_steps=12, model__arch__type=arch)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    folder = tmp_path / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1
    assert tokenizer.chat_template == TEMPLATES["hh"].jinja
    held_out = texts_of(folder, str(pairs))[-80:]
    right = []
    for (chosen, rejected), row in zip(held_out, row_scores(tmp_path / "run"), strict=True):
        for side in ("left", "right"):  # padded, whatever the side
            batch = tokenizer([chosen, rejected], padding=True, padding_side=side, return_tensors="pt")
            batch.pop("token_type_ids", None)
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                scores = model(**batch, position_ids=positions).logits[:, 0].tolist()
            assert scores == pytest.approx([row["chosen_score"], row["rejected_score"]], abs=1e-5)
        right.append(scores[0] > scores[1])
    metrics = read_manifest(tmp_path / "run")["metrics"]
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(right))
    config = json.loads((folder / "config.json").read_text())
    assert config["reward"]["mean"] == read_manifest(tmp_path / "run")["reward"]["mean"]


def test_an_adapter_is_loaded_by_peft_with_its_head(
    run_on_ranks: Runner, policy: Path, pairs: Path, tmp_path: Path
) -> None:
    overrides = from_policy(policy, pairs, lora="r16", train__max_steps=10, optim__lr=0.01)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    manifest, folder = read_manifest(tmp_path / "run"), tmp_path / "run" / "model"
    assert manifest["output"] == {
        "kind": "adapter", "task": "sequence_classification", "path": "model", "format": "peft"
    }  # fmt: skip
    assert manifest["base_digest"] == manifest["parents"][0]["digest"]
    assert manifest["reward"]["std"] > 0
    base = AutoModelForSequenceClassification.from_pretrained(policy / "model", num_labels=1)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (chosen, rejected), row = texts_of(folder, str(pairs))[-1], row_scores(tmp_path / "run")[-1]
    with torch.no_grad():
        scores = [
            model(input_ids=tokenizer(text, return_tensors="pt").input_ids).logits.item() for text in (chosen, rejected)
        ]
    assert scores == pytest.approx([row["chosen_score"], row["rejected_score"]], abs=1e-5)


# --- what it says


def test_everything_an_evaluation_leaves(run_on_ranks: Runner, pairs: Path, tmp_path: Path) -> None:
    overrides = rm_words(pairs, train__max_steps=8, train__eval_every=4, rm__num_worst=3)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    run_dir = tmp_path / "run"
    rows, report = row_scores(run_dir), evaluation(run_dir)
    chosen, rejected = (np.array([row[f"{side}_score"] for row in rows]) for side in ("chosen", "rejected"))
    difference = chosen - rejected
    figures, metrics = report["figures"], read_manifest(run_dir)["metrics"]
    assert figures["loss"] == pytest.approx(np.log1p(np.exp(-difference)).mean(), rel=1e-6)
    assert figures["margin"] == pytest.approx(difference.mean())
    assert figures["mean_reward"] == pytest.approx((chosen.mean() + rejected.mean()) / 2)
    accuracy = np.mean(difference > 0)
    assert figures["accuracy_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / len(rows)))
    assert (figures["chosen_std"], figures["rejected_mean"]) == pytest.approx((chosen.std(), rejected.mean()))
    assert sum(b["num"] for b in report["reliability"]) == len(rows) == 80
    assert report["reward"] == read_manifest(run_dir)["reward"]
    assert report["reward"]["mean"] == pytest.approx(chosen.mean())
    assert {f"eval_{name}" for name in figures} <= metrics.keys()
    worst = [json.loads(line) for line in (run_dir / "samples" / "worst_00000008.jsonl").read_text().splitlines()]
    assert [w["margin"] for w in worst] == pytest.approx(sorted(difference)[:3])
    texts = texts_of(run_dir / "model", str(pairs))
    for entry in worst:
        assert entry["path"] == str(pairs)
        assert (entry["prompt"] + entry["chosen"], entry["prompt"] + entry["rejected"]) == texts[entry["line"] - 1]
    for name in ("loss", "scores"):
        assert (run_dir / "plots" / f"{name}.png").stat().st_size > 5000
    logged = [line for line in read_metrics(run_dir) if "eval_accuracy" in line]
    assert [line["step"] for line in logged] == [4, 8]
    assert {"loss", "accuracy", "margin", "mean_reward", "grad_norm"} <= logged[0].keys()


def test_without_evaluation_data_the_moments_come_from_training_rows(
    run_on_ranks: Runner, pairs: Path, tmp_path: Path
) -> None:
    overrides = rm_words(pairs, train__max_steps=2, data__validation_split_percentage=0)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    manifest = read_manifest(tmp_path / "run")
    assert manifest["reward"]["std"] > 0
    assert "eval_accuracy" not in manifest["metrics"]


def test_scores_that_are_no_numbers_end_the_run(run_on_ranks: Runner, pairs: Path, tmp_path: Path) -> None:
    """The loss of the only step is still one, those of the evaluation after it are not."""
    options = {"optim__lr": 1e30, "optim__schedule": "constant", "optim__warmup_ratio": 0, "optim__min_warmup_steps": 0}
    overrides = rm_words(pairs, train__max_steps=1, model__arch__type="gpt2", **options)
    with pytest.raises(AssertionError, match=r"160 of 160 scores are no numbers, the first at .*pairs\.jsonl:241\b"):
        run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)


def test_with_early_stopping_model_and_figures_are_those_of_the_best_step(run_on_ranks: Runner, tmp_path: Path) -> None:
    """Labels drawn at random: what is learnt by heart makes the evaluation worse."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", rows=160, flipped=1.0)
    overrides = rm_words(
        pairs, train__max_steps=60, train__eval_every=3, train__early_stopping__patience=3, optim__lr=0.003
    )
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "run"), overrides=overrides)
    manifest, run_dir = read_manifest(tmp_path / "run"), tmp_path / "run"
    best = int(manifest["metrics"]["best_step"])
    assert best < manifest["metrics"]["steps"]
    report = json.loads((run_dir / "evaluation" / f"step_{best:08d}.json").read_text())
    assert manifest["metrics"]["eval_accuracy"] == report["figures"]["accuracy"]
    assert manifest["reward"] == report["reward"]
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    chosen, _ = texts_of(run_dir / "model", str(pairs))[-1]
    line = json.loads((run_dir / "evaluation" / f"scores_{best:08d}.jsonl").read_text().splitlines()[-1])
    with torch.no_grad():
        score = model(input_ids=tokenizer(chosen, return_tensors="pt").input_ids).logits.item()
    assert score == pytest.approx(line["chosen_score"], abs=1e-5)


def test_rows_that_an_earlier_stage_trained_on_are_found(
    run_on_ranks: Runner, policy: Path, pairs: Path, tmp_path: Path
) -> None:
    """sft held out the last 25 % of the same file, so of the last 50 % it trained on the first half."""
    overrides = from_policy(policy, pairs, train__max_steps=1, data__validation_split_percentage=25)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "clean"), overrides=overrides)
    assert read_manifest(tmp_path / "clean")["eval_rows_seen"] == []
    overrides = from_policy(policy, pairs, train__max_steps=1, data__validation_split_percentage=50)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "leaky"), overrides=overrides)
    assert read_manifest(tmp_path / "leaky")["eval_rows_seen"] == [{"run_dir": str(policy.resolve()), "rows": 80}]


# --- the same on every layout, and after a stop


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_losses_do_not_depend_on_the_layout(
    run_on_ranks: Runner, policy: Path, pairs: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    found = []
    layouts = [
        (1, {"rm__share_prompts": "never"}),
        (1, {"train__micro_batch_size": 1}),
        (2, {"deepspeed": "zero2"}),
        (2, {"deepspeed": "zero3"}),
    ]
    for number, (world_size, options) in enumerate(layouts):
        settings = {"train__max_steps": 8, "model__dtype": dtype, "optim__lr": 0.001, "rm__center_coef": 0.01}
        overrides = from_policy(policy, pairs, **settings, **options)
        run_on_ranks(world_size, RUN, run_dir=str(tmp_path / str(number)), overrides=overrides)
        found.append(losses(tmp_path / str(number)))
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=tolerance)


def test_a_run_that_goes_on_equals_one_that_never_stopped(
    run_on_ranks: Runner, policy: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = {
        "optim__schedule": "constant", "optim__warmup_ratio": 0, "train__save_every": 3, "lora": "r16",
        "lora__dropout": 0.1,
    }  # fmt: skip
    for name, steps in (("whole", 7), ("parts", 3), ("parts", 7)):
        overrides = from_policy(policy, pairs, train__max_steps=steps, **settings)
        run_on_ranks(1, RUN, run_dir=str(tmp_path / name), overrides=overrides)
    whole, parts = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert any(name.endswith("score.weight") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_starting_from_a_reward_model_keeps_its_head(run_on_ranks: Runner, pairs: Path, tmp_path: Path) -> None:
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "one"), overrides=rm_words(pairs, train__max_steps=20))
    overrides = from_policy(tmp_path / "one", pairs, train__max_steps=1, optim__lr=1e-9)
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "two"), overrides=overrides)
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert two["metrics"]["eval_accuracy"] == one["metrics"]["eval_accuracy"]
    assert two["parents"][0]["role"] == "reward"


def test_a_stage_that_writes_dialogues_is_no_place_for_a_reward_model(
    run_on_ranks: Runner, pairs: Path, tmp_path: Path
) -> None:
    run_on_ranks(1, RUN, run_dir=str(tmp_path / "rm"), overrides=rm_words(pairs, train__max_steps=1))
    data = write_dialogues(tmp_path / "d.jsonl")
    kept = [w for w in words(data) if not w.startswith(("model.init", "model.arch", "model.tokenizer"))]
    with pytest.raises(AssertionError, match="holds no finished policy"):
        run_on_ranks(1, RUN_SFT, run_dir=str(tmp_path / "sft"), overrides=[*kept, f"model.path={tmp_path / 'rm'}"])
