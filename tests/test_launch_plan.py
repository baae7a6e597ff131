"""What is decided before any rank starts: devices, launchers, world sizes, command lines."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from rlhf_cli.config.freeze import claim
from rlhf_cli.errors import ConfigError
from rlhf_cli.launch import choose_launcher, devices, num_processes, world_size
from rlhf_cli.launch.elastic import SPINS, elastic_command, free_port
from rlhf_cli.launch.multinode import deepspeed_command, deepspeed_environment, read_hostfile, slurm_command
from rlhf_cli.schema import LaunchConfig


@pytest.fixture(autouse=True)
def no_slurm_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "DS_ENV_FILE", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put executables of these names and shell lines first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("chosen", "installed", "count"),
    [
        ("0,1", 4, 2),
        ("3", 4, 1),
        ("0,7,1", 4, 1),  # 7 names nothing and hides what follows
        ("-1", 4, 0),
        ("NoDevFiles", 4, 0),
        ("GPU-8932f937,MIG-c7ba", 4, 2),
        (" 1 , 2 ", 4, 2),
    ],
)
def test_visible_devices(chosen: str, installed: int, count: int) -> None:
    assert devices.count_visible(chosen, installed) == count


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    programs(tmp_path, monkeypatch, **{"nvidia-smi": "exit 9"})  # no driver to talk to
    assert devices.installed_gpus(tmp_path) == 3
    listing = "printf 'GPU 0: A100 (UUID: GPU-1)\\n  MIG 1g.5gb Device 0: (UUID: MIG-2)\\nGPU 1: A100 (UUID: GPU-3)\\n'"
    programs(tmp_path, monkeypatch, **{"nvidia-smi": listing})
    assert devices.installed_gpus(tmp_path) == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert num_processes(LaunchConfig()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert num_processes(LaunchConfig()) == 1


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_processes(LaunchConfig()) == 1
    assert num_processes(LaunchConfig(num_processes=8)) == 8  # on CPU
    monkeypatch.setattr(devices, "visible_gpus", lambda: 2)
    assert num_processes(LaunchConfig(num_processes=2)) == 2
    with pytest.raises(ConfigError, match=r"launch\.num_processes: 3 ranks need as many GPUs, 2 are visible"):
        num_processes(LaunchConfig(num_processes=3))


def test_hyper_threads_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3,7"] * 2):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert devices.threads_per_rank(1, tmp_path) == 4
    assert devices.threads_per_rank(2, tmp_path) == 2
    assert devices.threads_per_rank(3, tmp_path) == 1
    assert devices.threads_per_rank(9, tmp_path) == 1
    assert devices.threads_per_rank(2, tmp_path / "nowhere") == 4  # no topology: each processor is a core


def test_elastic_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    command = elastic_command(LaunchConfig(), 2, "rlhf_cli.worker", tmp_path / "config.yaml", tmp_path)
    assert command.argv[-3:] == ["--module", "rlhf_cli.worker", str(tmp_path / "config.yaml")]
    assert "localhost:0" in command.argv
    assert command.env["OMP_NUM_THREADS"] == str(devices.threads_per_rank(2))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    port = free_port()
    command = elastic_command(LaunchConfig(master_port=port), 2, "m", tmp_path / "config.yaml", tmp_path)
    assert command.argv[command.argv.index("--master-port") + 1] == str(port)
    assert "OMP_NUM_THREADS" not in command.env
    assert command.env["GOMP_SPINCOUNT"] == SPINS
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "GOMP_SPINCOUNT" not in elastic_command(LaunchConfig(), 2, "m", tmp_path / "c.yaml", tmp_path).env


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nnode1 slots=8\n\nnode2  slots=4 # half of it\n")
    assert read_hostfile(path) == {"node1": 8, "node2": 4}
    launch = LaunchConfig(hostfile=str(path))
    assert choose_launcher(launch) == "deepspeed"
    assert world_size(launch) == 12
    assert world_size(LaunchConfig(hostfile=str(path), num_processes=4)) == 8
    with pytest.raises(ConfigError, match=r"5 ranks per machine, but .*hosts has node2 slots=4"):
        world_size(LaunchConfig(hostfile=str(path), num_processes=5))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("node1 slots=8\nnode2\n", ":2: got 'node2'; allowed: NAME slots="),
        ("node1 slots=0\n", ":1: got"),
        ("node1 slots=8\nnode1 slots=8\n", ":2: node1 is listed twice"),
        ("# nothing\n", "lists no machine"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=r"launch\.hostfile: .*hosts.*" + problem):
        read_hostfile(tmp_path / "hosts")


def test_deepspeed_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    launch = LaunchConfig(hostfile=str(tmp_path / "hosts"), num_processes=4, master_port=29511)
    programs(tmp_path, monkeypatch, pdsh="exit 0")
    command = deepspeed_command(launch, "rlhf_cli.worker", tmp_path / "config.yaml", tmp_path)
    assert command.argv[1:] == [
        *("-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts"), "--force_multi"),
        *("--master_port", "29511", "--no_local_rank", "--num_gpus", "4"),
        *("--module", "rlhf_cli.worker", str(tmp_path / "config.yaml")),
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"launch\.hostfile: needs the program pdsh"):
        deepspeed_command(launch, "rlhf_cli.worker", tmp_path / "config.yaml", tmp_path)


def test_settings_reach_the_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "/our/cache")
    monkeypatch.setenv("HF_STRANGE", 'a"b')  # what the runner cannot quote stays here
    monkeypatch.setenv("SOMETHING", "else")
    monkeypatch.setenv("RLHF_CACHE", "/scratch/tokens")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("RLHF_TERMINAL_FD", "0")  # of this machine
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/their/cache\nMINE=x=y\n")
    lines = deepspeed_environment().splitlines()
    assert "HF_HUB_OFFLINE=1" in lines
    assert "MINE=x=y" in lines
    assert {"RLHF_CACHE=/scratch/tokens", "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"} < set(lines)
    assert [line for line in lines if line.startswith("HF_HOME")] == ["HF_HOME=/their/cache"]
    assert not [line for line in lines if line.startswith(("HF_STRANGE", "SOMETHING", "RLHF_TERM"))]


def test_deepspeeds_runner_reads_our_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Canary: the real runner, with pdsh and ssh replaced, exports what DS_ENV_FILE names and starts our module."""
    import subprocess

    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    programs(tmp_path, monkeypatch, pdsh='for word in "$@"; do echo "word: $word"; done', ssh="echo 10.0.0.1")
    monkeypatch.setenv("HF_HOME", "/our cache")
    launch = LaunchConfig(hostfile=str(tmp_path / "hosts"))
    command = deepspeed_command(launch, "rlhf_cli.worker", tmp_path / "config.yaml", tmp_path)
    environment = os.environ | command.env
    done = subprocess.run(command.argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = [line[6:] for line in done.stdout.splitlines() if line.startswith("word: ")]
    assert any('export HF_HOME="/our cache";' in word for word in words)
    assert words[-2:] == ["rlhf_cli.worker", str(tmp_path / "config.yaml")]
    assert {"--module", "--no_local_rank", "node1,node2"} < set(words)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if number == errno.EIO:  # anything else is what it was
        with pytest.raises(ConfigError, match=r"run_dir: .*run cannot be written to \(.*Input/output error"):
            claim(tmp_path / "run", "new", {"stage": "sft"})
        return
    held, frozen = claim(tmp_path / "run", "new", {"stage": "sft"})
    held.close()
    assert frozen.read_text() == "stage: sft\n"
    said = f"{tmp_path}/run: no lock on this file system ({os.strerror(number)}); see that no second rlhf works in it\n"
    assert capsys.readouterr().err == said


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"launch\.launcher: slurm works inside an allocation only"):
        world_size(LaunchConfig(launcher="slurm"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert choose_launcher(LaunchConfig()) == "elastic"
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert choose_launcher(LaunchConfig()) == "slurm"
    assert choose_launcher(LaunchConfig(launcher="elastic")) == "elastic"
    assert world_size(LaunchConfig()) == 3
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert world_size(LaunchConfig()) == 6
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert world_size(LaunchConfig()) == 24
    assert world_size(LaunchConfig(num_processes=4)) == 12

    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "64")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs the program srun"):
        slurm_command(LaunchConfig(), "rlhf_cli.worker", tmp_path / "config.yaml")
    programs(tmp_path, monkeypatch, srun="exit 0")
    command = slurm_command(LaunchConfig(master_port=1234), "rlhf_cli.worker", tmp_path / "config.yaml")
    assert command.argv[:4] == ["srun", "--nodes=3", "--ntasks=24", "--ntasks-per-node=8"]
    assert "--cpus-per-task=8" in command.argv  # 64 / 8
    assert {"--overlap", "--export=ALL"} < set(command.argv)
    assert command.argv[-3:] == ["-m", "rlhf_cli.worker", str(tmp_path / "config.yaml")]
    assert command.env == {"MASTER_PORT": "1234", "RLHF_PLANNED_RANKS": "24"}


def test_the_cpus_of_a_slurm_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch sets for the lines that the documents show, and for one that asks for too little."""
    programs(tmp_path, monkeypatch, srun="exit 0")
    for name, value in {"JOB_ID": "7", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_ON_NODE": "96"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    argv = slurm_command(LaunchConfig(), "rlhf_cli.worker", tmp_path / "config.yaml").argv
    assert {"--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"} < set(argv)
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "96,64")  # every machine has to carry its ranks
    argv = slurm_command(LaunchConfig(), "rlhf_cli.worker", tmp_path / "config.yaml").argv
    assert "--cpus-per-task=8" in argv
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "2(x2)")  # --ntasks-per-node=1 and nothing else
    with pytest.raises(ConfigError, match=r"num_processes: 8 ranks on a machine, but the allocation has 2 of its CPUs"):
        world_size(LaunchConfig(launcher="slurm"))


def test_ranks_are_told_what_the_front_reckons_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path, monkeypatch, pdsh="exit 0")
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=4\n")
    hostfile = LaunchConfig(hostfile=str(tmp_path / "hosts"))
    command = elastic_command(LaunchConfig(), 2, "m", tmp_path / "config.yaml", tmp_path)
    assert (command.env["RLHF_PLANNED_RANKS"], "RLHF_COUNTED_GPUS" in command.env) == ("2", False)
    deepspeed_command(hostfile, "m", tmp_path / "config.yaml", tmp_path)
    assert "RLHF_PLANNED_RANKS=12\n" in (tmp_path / "deepspeed_env").read_text()
    monkeypatch.setattr("rlhf_cli.launch.command.visible_gpus", lambda: 8)
    assert elastic_command(LaunchConfig(), 2, "m", tmp_path / "c.yaml", tmp_path).env["RLHF_COUNTED_GPUS"] == "8"
    deepspeed_command(hostfile, "m", tmp_path / "config.yaml", tmp_path)
    assert "RLHF_COUNTED_GPUS=8\n" in (tmp_path / "deepspeed_env").read_text()
