"""Rewards from a user's function: what it is given, and how its mistakes are told."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.data.rows import Message
from rlhf_cli.errors import ConfigError, RlhfError, RunFailed
from rlhf_cli.reward.function import open_function
from rlhf_cli.reward.source import ScoredText, no_progress
from rlhf_cli.schema import RewardSourceConfig

TEXTS = [
    ScoredText((Message("user", "Why?"),), "So.", {"id": 7, "gold": "So it is."}, "a.jsonl:1"),
    ScoredText(None, "Raw text", {"id": 8}, "a.jsonl:2"),
    ScoredText((Message("system", "Be kind."), Message("user", "Hi")), "Hey", {}, "a.jsonl:3"),
]


def scores(tmp_path: Path, code: str, texts: list[ScoredText] = TEXTS, name: str = "f") -> list[float]:
    (tmp_path / "mine.py").write_text(code)
    config = RewardSourceConfig(type="function", path=str(tmp_path / "mine.py"), function=name)
    return open_function(config, "mine", "reward.sources[0]").score(texts, no_progress)


def said(tmp_path: Path, code: str, kind: type[RlhfError] = RunFailed, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        scores(tmp_path, code, **more)
    return str(caught.value)


def test_prompts_are_plain_and_columns_those_it_takes(tmp_path: Path) -> None:
    code = """
def f(prompts, responses, gold=None):
    assert prompts == ["Why?", "", "System: Be kind.\\n\\nUser: Hi"], prompts
    assert responses == ["So.", "Raw text", "Hey"]
    assert gold == ["So it is.", None, None], gold
    return [1, 2.5, True]
"""
    assert scores(tmp_path, code) == [1.0, 2.5, 1.0]


def test_kwargs_take_every_column(tmp_path: Path) -> None:
    code = """
def f(prompts, responses, **columns):
    assert columns == {"id": [7, 8, None], "gold": ["So it is.", None, None]}, columns
    return [0.0] * len(responses)
"""
    assert scores(tmp_path, code) == [0.0] * 3


@pytest.mark.parametrize(
    "made", ["np.array([1, 2, 3])", "torch.tensor([1., 2., 3.])", "[np.float32(1), torch.tensor(2), 3]"]
)
def test_arrays_and_tensors_are_fine(tmp_path: Path, made: str) -> None:
    assert scores(tmp_path, f"import numpy as np, torch\ndef f(p, r): return {made}\n") == [1.0, 2.0, 3.0]


def test_files_beside_it_can_be_imported_and_a_dotted_name_too(tmp_path: Path) -> None:
    (tmp_path / "beside_the_reward.py").write_text("def length(p, r): return [len(x) for x in r]\n")
    assert scores(tmp_path, "from beside_the_reward import length as f\n") == [3, 8, 3]
    sys.path.append(str(tmp_path))
    try:
        config = RewardSourceConfig(type="function", function="beside_the_reward.length")
        assert open_function(config, "n", "k").score(TEXTS, no_progress) == [3, 8, 3]
    finally:
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[1, 2]", r"'mine' \(f, .*mine\.py:1\) must give one number per response: 3 responses, 2 numbers"),
        ("None", "must give a list of 3 numbers, got NoneType"),
        ("'abc'", "must give a list of 3 numbers, got str"),
        ("[1, 2, None]", r"gave None, no finite number, for sample 2 \(a\.jsonl:3\), which starts 'System: Be kind"),
        ("[1, float('nan'), 2]", r"gave nan, no finite number, for sample 1 \(a\.jsonl:2\), which starts 'Raw text'"),
        ("['1', 2, 3]", "gave '1', no finite number, for sample 0"),
        ("[float('inf'), 2, 3]", "gave inf"),
        ("[[1], 2, 3]", r"gave \[1\], no finite number"),
        ("[10**400, 2, 3]", "gave 10000"),
    ],
)
def test_wrong_answers_name_the_sample(tmp_path: Path, answer: str, message: str) -> None:
    assert re.search(message, said(tmp_path, f"def f(prompts, responses): return {answer}\n"))


def test_an_exception_in_it_is_one_line_with_its_place(tmp_path: Path) -> None:
    code = "import json\n\ndef f(prompts, responses):\n    return [json.loads(r) for r in responses]\n"
    message = said(tmp_path, code)
    assert "\n" not in message
    assert re.search(r"'mine' .* raised JSONDecodeError: .* \(in .*mine\.py:4\)$", message)


def test_leaving_python_is_a_mistake_like_another(tmp_path: Path) -> None:
    assert re.search(
        r"raised SystemExit: 0 \(in .*mine\.py:3\)", said(tmp_path, "import sys\ndef f(p, r):\n    sys.exit(0)\n")
    )
    assert "cannot be imported: SystemExit: 0" in said(tmp_path, "raise SystemExit(0)\n", ConfigError)


def test_a_file_may_hold_dataclasses_and_be_called_as_a_module_of_the_library(tmp_path: Path) -> None:
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    assert scores(tmp_path, code + "def f(p, r): return [A(1).x] * len(r)\n") == [1, 1, 1]
    import json

    (tmp_path / "json.py").write_text("def f(p, r): return [2] * len(r)\n")
    config = RewardSourceConfig(type="function", path=str(tmp_path / "json.py"), function="f")
    assert open_function(config, "mine", "k").score(TEXTS, no_progress) == [2, 2, 2]
    assert sys.modules["json"] is json


def test_a_column_that_the_data_lacks(tmp_path: Path) -> None:
    message = said(tmp_path, "def f(prompts, responses, referense): return []\n")
    assert "needs the column 'referense'" in message
    assert "further columns are id, gold" in message


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def g(prompts, responses): return []", r"sources\[0\]\.function: .*has no function 'f'; its functions are g"),
        ("f = 3", "has no function 'f'"),
        ("def f(prompts): return []", "must take .prompts, responses, .*, it takes 1"),
        ("def f(:", r"sources\[0\]\.path: .*mine.py is no valid Python: .*mine.py:1: "),
        ("import nothing_like_it", r"cannot be imported: ModuleNotFoundError: .*nothing_like_it.* \(in .*mine.py:1\)"),
    ],
)
def test_a_module_that_is_of_no_use(tmp_path: Path, code: str, message: str) -> None:
    assert re.search(message, said(tmp_path, code + "\n", ConfigError))


def test_names_that_lead_nowhere() -> None:
    for options, message in [
        ({"path": "/nowhere/mine.py", "function": "f"}, "no such file: /nowhere/mine.py"),
        ({"function": "f"}, "is no dotted name"),
        ({"function": "no_such_module_here.f"}, "no_such_module_here cannot be imported"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_function(RewardSourceConfig(type="function", **options), "n", "reward.sources[0]")


def test_nothing_to_score_calls_nothing(tmp_path: Path) -> None:
    assert scores(tmp_path, "def f(p, r): raise AssertionError\n", []) == []
