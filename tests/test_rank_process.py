"""Pieces of a rank's life that need no job around them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from rlhf_cli.errors import DataError, RunFailed
from rlhf_cli.jobfiles import read_notes
from rlhf_cli.runtime.process import first_host, report_failure, slurm_environment
from rlhf_cli.runtime.terminal import Terminal


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("a-[1-2]-x.example,b", "a-1-x.example"),
        ("rack[0-1]node[05-06]", "rack0node05"),
        ("n1,n2", "n1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_slurm_environment() -> None:
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_NODELIST": "gpu[03-05]",
        "SLURM_JOB_ID": "1234567",
    }
    torch_names = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu03"}
    assert slurm_environment(slurm) == torch_names | {"MASTER_PORT": "24567"}  # 20000 + 1234567 mod 10000
    assert slurm_environment(slurm | {"MASTER_PORT": "1111"})["MASTER_PORT"] == "1111"


def test_report_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert report_failure(tmp_path, DataError("rows.jsonl:3: empty")) == 2
    (note,) = read_notes(tmp_path)
    assert (note.rank, note.kind, note.message, note.traceback, note.exit_code) == (
        *(3, "user", "rows.jsonl:3: empty", ""),
        2,
    )
    assert report_failure(tmp_path, RunFailed("the disk is full")) == 1
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 // 0
    assert report_failure(tmp_path, caught.value) == 1
    user, crash = read_notes(tmp_path)  # by time
    assert (user.rank, crash.rank) == (3, 2)
    assert crash.message.startswith("ZeroDivisionError: ")
    assert "_ = 1 // 0" in crash.traceback
    assert "_ = 1 // 0" in capsys.readouterr().err


def test_the_log_keeps_what_stays_on_the_terminal() -> None:
    read, write = os.pipe()
    log = io.StringIO()
    terminal = Terminal(write, log)
    for text in (
        "\r\x1b[2K 10%",
        "\r\x1b[2K\x1b[1mstep\x1b[0m 1\n",
        "\r\x1b[2K 20%",
        "\r\x1b[2K",
        "100%\n",
        "win\r",
        "\nx",
    ):
        assert terminal.write(text) == len(text)
    assert log.getvalue() == "step 1\n100%\nwin\n"
    assert (
        os.read(read, 1000).decode()
        == "\r\x1b[2K 10%\r\x1b[2K\x1b[1mstep\x1b[0m 1\n\r\x1b[2K 20%\r\x1b[2K100%\nwin\r\nx"
    )
    assert not terminal.isatty()
    assert terminal.fileno() == write
    os.close(read)
    terminal.write("y\nz\n")  # nobody reads any more
    terminal.write("still here\n")
    assert log.getvalue().splitlines()[3:] == [
        "xy",
        "z",
        "the terminal is gone ([Errno 32] Broken pipe); messages go to this log only",
        "still here",
    ]
    os.close(write)
