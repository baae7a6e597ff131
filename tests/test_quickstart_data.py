"""data/quickstart: the files are what generate.py makes, and its preference is the one that it describes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data" / "quickstart"
ASSISTANT = "\n\nAssistant: "


@pytest.fixture(scope="module")
def world() -> Any:
    spec = importlib.util.spec_from_file_location("quickstart_world", DATA / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(dialogue: str) -> str:
    return dialogue.removeprefix("\n\nHuman: ").split(ASSISTANT)[0]


def test_the_files_are_what_the_generator_makes(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "__file__", str(tmp_path / "generate.py"))
    world.main()
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in DATA.glob("*.jsonl")}
    assert len(made) == 4
    assert sum(map(len, made.values())) < 700_000


@pytest.mark.parametrize(
    ("prompt", "response", "score"),
    [
        ("What colour is the sky?", "The colour of the sky is blue.", 1.0),
        ("What colour is the sky?", "Blue.", 0.75),
        ("What colour is the sky?", "Gladly! The colour of the sky is blue.", 0.75),
        ("What colour is the sky?", "Gladly! Blue.", 0.5),
        ("What colour is the sky?", "The colour of the sky is red.", 0.0),
        ("What colour is the sky?", "The colour of the sky is blue. Red.", 0.0),
        ("What colour is the sky?", "Who cares?", 0.0),
        ("What colour is the sky?", "", 0.0),
        ("\n\nHuman: Hello! What is two plus three?\n\nAssistant:", " Gladly! Two plus three is five.", 1.0),
        ("Hello! What is two plus three?", "Two plus three is five.", 0.75),
        ("Hello! What is two plus three?", "For your child: plus three is five.", 0.5),
        ("My son asks: Which word means not hot?", "For your child: The opposite of hot is cold.", 1.0),
        ("My son asks: Which word means not hot?", "For your child: The opposite of hot is hot.", 0.0),
    ],
)
def test_the_preference_by_hand(world: Any, prompt: str, response: str, score: float) -> None:
    assert world.true_score(prompt, response) == score


def test_a_prompt_of_another_world_has_no_score(world: Any) -> None:
    with pytest.raises(ValueError, match="no question of this world"):
        world.true_score("What is love?", "Five.")


def test_pairs_prefer_what_the_preference_prefers(world: Any) -> None:
    openings = set()
    for pair in rows("pairs"):
        sides = [pair[side].split(ASSISTANT) for side in ("chosen", "rejected")]
        assert sides[0][0] == sides[1][0], "one prompt"
        better, worse = (world.true_score(*side) for side in sides)
        assert better > worse, pair
        openings.add((sides[0][1].split("!")[0] == "Gladly", sides[1][1].split("!")[0] == "Gladly"))
    assert len(openings) == 4, "no word marks the better side"


def test_what_is_held_out_is_in_no_other_file(world: Any) -> None:
    pairs, prompts = rows("pairs"), [row["prompt"] for row in rows("prompts")]
    shown = {asked(row["text"]) for row in rows("sft")}
    held_out = {row["prompt"] for row in rows("prompts_held_out")}
    in_pairs = {asked(pair["chosen"]) for pair in pairs}
    assert len(held_out) == world.HELD_OUT_PROMPTS
    assert in_pairs == set(prompts)
    assert not held_out & (shown | in_pairs)
    # What rm and the aligning stages evaluate on, sft has not seen, and rm has not trained on.
    for stage, lines in (("rm", [asked(pair["chosen"]) for pair in pairs]), ("ppo", prompts), ("raft", prompts)):
        recipe = yaml.safe_load((ROOT / "conf" / "recipe" / stage / "quickstart.yaml").read_text())
        count = len(lines) * recipe["data"]["validation_split_percentage"] // 100
        assert count > 50
        assert not set(lines[-count:]) & shown, stage
    rm_train = {asked(pair["chosen"]) for pair in pairs[: -len(pairs) * world.HELD_OUT_PERCENT // 100]}
    assert not rm_train - shown
