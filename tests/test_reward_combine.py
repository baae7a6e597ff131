"""Several sources as one reward: names, weights, clipping; ROUGE; the way in from Python."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.data.rows import Message
from rlhf_cli.errors import ConfigError, DataError
from rlhf_cli.reward import open_reward
from rlhf_cli.reward.combine import describe_rewards, open_rewards, source_names
from rlhf_cli.reward.rouge import open_rouge
from rlhf_cli.reward.source import ScoredText, no_progress
from rlhf_cli.schema import RewardConfig, RewardSourceConfig
from tests.reward_models import write_decoder, write_run

CPU = torch.device("cpu")


def functions(tmp_path: Path) -> list[RewardSourceConfig]:
    (tmp_path / "two.py").write_text(
        "def length(prompts, responses): return [len(r) for r in responses]\n"
        "def gold(prompts, responses, gold): return gold\n"
    )
    path = str(tmp_path / "two.py")
    return [
        RewardSourceConfig(type="function", path=path, function="length", weight=0.5),
        RewardSourceConfig(type="function", path=path, function="gold", weight=-2.0, name="gold"),
    ]


def test_weighted_sum_and_clip_by_hand(tmp_path: Path) -> None:
    texts = [
        ScoredText(None, "abcd", {"gold": 1.0}),
        ScoredText(None, "", {"gold": -3}),
        ScoredText(None, "ab", {"gold": 0}),
    ]
    config = RewardConfig(sources=functions(tmp_path))
    scored = open_rewards(config, CPU).score(texts)
    assert scored.by_source["function"].tolist() == [4, 0, 2]
    assert scored.by_source["gold"].tolist() == [1, -3, 0]
    assert scored.total.tolist() == [0.5 * 4 - 2 * 1, 0 + 2 * 3, 0.5 * 2 - 0]
    config.clip = 0.75
    clipped = open_rewards(config, CPU).score(texts)
    assert clipped.total.tolist() == [0.0, 0.75, 0.75]
    assert clipped.by_source["gold"].tolist() == [1, -3, 0]


def test_names() -> None:
    named = lambda *pairs: source_names([RewardSourceConfig(type=t, name=n) for t, n in pairs])
    assert named(("model", None), ("rouge", None), ("model", None)) == ["model", "rouge", "model_2"]
    assert named(("model", None), ("http", "model"), ("model", None)) == ["model_2", "model", "model_3"]


def test_only_models_are_normalised(tmp_path: Path) -> None:
    write_decoder(tmp_path / "run" / "model")
    write_run(tmp_path / "run", reward={"mean": 1.0, "std": 0.5})
    sources = [RewardSourceConfig(path=str(tmp_path / "run")), functions(tmp_path)[0]]
    raw, normal = (
        open_rewards(RewardConfig(sources=sources, normalize=n), CPU).score([ScoredText(None, "abc")])
        for n in (False, True)
    )
    assert normal.by_source["model"].item() == pytest.approx((raw.by_source["model"].item() - 1) / 0.5)
    assert normal.by_source["function"].item() == raw.by_source["function"].item() == 3


def test_a_description_without_weights(tmp_path: Path) -> None:
    write_decoder(tmp_path / "run" / "model", labels=["no", "yes"])
    write_run(tmp_path / "run", template="chatml")
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    source = RewardSourceConfig(type="classifier", path=str(tmp_path / "run"), label="yes", weight=2)
    told = describe_rewards(RewardConfig(sources=[source, functions(tmp_path)[0]]))
    assert told["reward classifier"] == (
        f"{tmp_path / 'run'} (LlamaForSequenceClassification, log_prob of yes, template chatml), weight 2"
    )
    assert told["reward function"].startswith("length, ")


# --- ROUGE


def rouge(kind: str, reference: Any, response: str) -> float:
    source = open_rouge(RewardSourceConfig(type="rouge", rouge=kind, reference="gold"), "rouge")  # type: ignore[arg-type]
    (score,) = source.score([ScoredText(None, response, {"gold": reference})], no_progress)
    return score


def test_rouge_by_hand() -> None:
    """reference: the cat sat on the mat (6 words); response: the cat lay (3 words)."""
    reference, response = "The cat sat on the mat.", "the cat lay"
    # 2 common words: precision 2/3, recall 2/6, F = 2PR/(P+R) = 4/9
    assert rouge("rouge1", reference, response) == pytest.approx(4 / 9)
    # 1 common pair of 2 and 5: P = 1/2, R = 1/5, F = 2/7
    assert rouge("rouge2", reference, response) == pytest.approx(2 / 7)
    # longest common subsequence: the cat
    assert rouge("rougeL", reference, response) == pytest.approx(4 / 9)


@given(st.lists(st.sampled_from("abcd"), max_size=9), st.lists(st.sampled_from("abcd"), min_size=1, max_size=9))
def test_rouge_l_is_the_longest_common_subsequence(response: list[str], reference: list[str]) -> None:
    table = [[0] * (len(reference) + 1) for _ in range(len(response) + 1)]
    for i, a in enumerate(response):
        for j, b in enumerate(reference):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    expected = 2 * table[-1][-1] / (len(response) + len(reference))
    assert rouge("rougeL", " ".join(reference), " ".join(response)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"needs the text of a reference in the column 'gold' for sample 0.*columns are \(none\)"),
        ({"gold": None}, "the column holds None"),
        ({"gold": "床前明月光"}, r"sees no word \(a-z, 0-9\) in the reference"),
    ],
)
def test_a_reference_that_is_of_no_use(columns: dict[str, Any], message: str) -> None:
    source = open_rouge(RewardSourceConfig(type="rouge", reference="gold"), "rouge")
    with pytest.raises(DataError, match=message):
        source.score([ScoredText(None, "text", columns)], no_progress)


# --- from Python


def test_prompts_as_text_messages_or_none(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def f(prompts, responses, tag):\n"
        "    return [len(p) + 10 * len(r) + t for p, r, t in zip(prompts, responses, tag)]\n"
    )
    reward = open_reward(tmp_path / "f.py", type="function", function="f", weight=2)
    prompts = ["abc", [{"role": "user", "content": "ab"}], None]
    assert reward.score(prompts, ["x", "", "yy"], {"tag": [0, 1, 2]}) == [2 * 13, 2 * 3, 2 * 22]
    with pytest.raises(DataError, match="3 responses, but 1 prompts"):
        reward.score(["abc"], ["x", "", "yy"])
    with pytest.raises(DataError, match=r"prompts\[1\] is neither text nor a list"):
        reward.score(["abc", [3]], ["x", ""])  # type: ignore[list-item]


def test_a_text_prompt_is_one_message_of_the_user(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm")
    reward = open_reward(tmp_path / "rm", template="chatml")
    as_messages = reward.score([[{"role": "user", "content": "Why?"}]], ["So."])
    assert reward.score(["Why?"], ["So."]) == as_messages
    assert reward.rewards.score([ScoredText((Message("user", "Why?"),), "So.")]).total.tolist() == as_messages


def test_options_are_checked_as_in_a_config() -> None:
    with pytest.raises(ConfigError, match="label: is required by type classifier"):
        open_reward("somewhere", type="classifier")


def test_order_is_kept(tmp_path: Path) -> None:
    write_decoder(tmp_path / "rm")
    reward = open_reward(tmp_path / "rm", batch_size=3)
    draw = random.Random(0)
    texts = ["a b c d"[: draw.randint(0, 7)] * draw.randint(1, 4) for _ in range(20)]
    forwards = reward.score(None, texts)
    assert reward.score(None, texts[::-1])[::-1] == pytest.approx(forwards, abs=1e-5)
