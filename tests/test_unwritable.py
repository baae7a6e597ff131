"""Disks that are full or read-only, and files that were damaged: told in one message, no traceback."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rlhf_cli.config.freeze import claim, standing
from rlhf_cli.errors import CheckpointError, ConfigError, ModelError
from rlhf_cli.jobfiles import read_notes
from rlhf_cli.rundir import read_manifest
from rlhf_cli.runtime.metrics import read_metrics
from rlhf_cli.runtime.process import report_failure


def test_a_run_dir_that_cannot_be_made_is_a_wrong_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: .*file/run cannot be written to \(.*Not a directory"):
        claim(tmp_path / "file" / "run", "new", {"stage": "sft"})


def test_claim_locks_and_freezes(tmp_path: Path) -> None:
    held, frozen = claim(tmp_path / "run", "new", {"stage": "sft"})
    assert frozen.read_text() == "stage: sft\n"
    with pytest.raises(ConfigError, match="in use by another"):
        claim(tmp_path / "run", "new", {"stage": "sft"})
    held.close()
    claim(tmp_path / "run", "unfinished", {"stage": "sft"})[0].close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert report_failure(tmp_path, error) == 1
    (note,) = read_notes(tmp_path)
    assert (note.kind, note.traceback) == ("user", "")
    assert note.message.startswith(f"the disk is full ({error}); make room in {tmp_path}")


def test_no_room_even_for_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file, so that no note can be written into it")
    monkeypatch.setenv("RANK", "0")
    assert report_failure(tmp_path, ValueError("the cause")) == 1
    assert "ValueError: the cause" in capsys.readouterr().err, "the log still tells"


@pytest.mark.parametrize("text", ["a: [1,", "", "just words", "\x00\x00"])
def test_a_damaged_config_of_a_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"config.yaml is damaged.*put it back, or name another"):
        standing(tmp_path, {"stage": "sft"}, "auto")


@pytest.mark.parametrize("text", ["[]", "null", "{", ""])
def test_a_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=r"manifest.json is damaged"):
        read_manifest(tmp_path)


def test_a_damaged_line_of_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2 is damaged"):
        list(read_metrics(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert list(read_metrics(tmp_path)) == [{"step": 1}], "a line that a kill cut off is no damage"
