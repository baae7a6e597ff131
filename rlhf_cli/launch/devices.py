"""How many ranks this machine carries, found without torch so that the front process stays light."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.schema import LaunchConfig


def num_processes(launch: LaunchConfig) -> int:
    """Ranks on this machine: as asked for, or one for each visible GPU, or one on CPU.

    Raises ConfigError when there are GPUs, but fewer than the ranks asked for.
    """
    gpus = visible_gpus()
    if launch.num_processes == "auto":
        return max(1, gpus)
    if 0 < gpus < launch.num_processes:
        raise ConfigError(
            [
                Problem(
                    "launch.num_processes",
                    f"{launch.num_processes} ranks need as many GPUs, {gpus} are visible; allowed: 1 to {gpus}, or auto"
                    " (CUDA_VISIBLE_DEVICES chooses among them; empty, it runs on CPU with any number of ranks)",
                )
            ]
        )
    return launch.num_processes


def visible_gpus() -> int:
    """GPUs that CUDA will show to a process started here."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and not chosen.strip():
        return 0
    installed = installed_gpus()
    return installed if chosen is None else count_visible(chosen, installed)


def count_visible(chosen: str, installed: int) -> int:
    """GPUs left by a CUDA_VISIBLE_DEVICES value. The first entry that names no device hides itself and all after it,
    as the CUDA programming guide says under "CUDA environment variables"; devices may be named by number or UUID."""
    count = 0
    for entry in chosen.split(","):
        word = entry.strip()
        is_device = int(word) < installed if word.isdecimal() else word.startswith(("GPU-", "MIG-"))
        if not is_device:
            break
        count += 1
    return count


def installed_gpus(dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that this process may open."""
    nodes = sum(1 for path in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    if shutil.which("nvidia-smi"):
        # A container can see the device nodes of GPUs that were not given to it; nvidia-smi lists only its own.
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            return sum(1 for line in listed.stdout.splitlines() if line.startswith("GPU "))
    return nodes


def threads_per_rank(ranks: int, cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores for each rank: those this process may use, hyper-threads of one core counted once, as torch does."""
    allowed = os.sched_getaffinity(0)
    siblings = [cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in allowed]
    cores = {path.read_text() for path in siblings if path.exists()}
    return max(1, (len(cores) or len(allowed)) // ranks)
