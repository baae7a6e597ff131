"""What an installed package holds: everything that the checkout has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_named() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    named = set(re.findall(r'"([\w.]+)"', listed[1]))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "rlhf_cli").rglob("__init__.py")}
    assert named == found | {"rlhf_cli.conf"}


def test_every_file_that_is_no_code_is_named() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    others = [p for p in (ROOT / "rlhf_cli").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert others
    assert all(f'"{path.name}"' in text for path in others), "see [tool.setuptools.package-data]"
