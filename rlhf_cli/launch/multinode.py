"""Several machines that share the run directory: DeepSpeed's hostfile runner, or srun inside a Slurm allocation."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

from rlhf_cli.errors import ConfigError, Problem
from rlhf_cli.launch.command import JobCommand, told_to_ranks
from rlhf_cli.launch.devices import visible_gpus
from rlhf_cli.launch.elastic import free_port
from rlhf_cli.schema import LaunchConfig

# pdsh starts ranks in a bare login environment; these are the settings of ours that change what a rank does.
FORWARDED_PREFIXES = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "TRITON_"),
    *("WANDB_", "CUDA_HOME", "TMPDIR", "PATH", "LD_LIBRARY_PATH", "XDG_CACHE_HOME"),
    "RLHF_CACHE",  # no other RLHF_: a descriptor or a process of this machine means nothing on another
)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the order of the file (`node1 slots=8`, # starts a comment).

    Raises ConfigError that names file and line.
    """
    if not path.is_file():
        raise _hostfile_problem(f"{path} is not a file; it has one line per machine: NAME slots=NUMBER_OF_RANKS")
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split("#", 1)[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", words)
        if match is None:
            raise _hostfile_problem(f"{path}:{number}: got {words!r}; allowed: NAME slots=NUMBER_OF_RANKS")
        if match[1] in slots:
            raise _hostfile_problem(f"{path}:{number}: {match[1]} is listed twice; one line per machine")
        slots[match[1]] = int(match[2])
    if not slots:
        raise _hostfile_problem(f"{path} lists no machine; it has one line per machine: NAME slots=NUMBER_OF_RANKS")
    return slots


def hostfile_world_size(launch: LaunchConfig) -> int:
    """Ranks over all hosts: their slots, or launch.num_processes on each."""
    slots = read_hostfile(_hostfile(launch))
    if launch.num_processes == "auto":
        return sum(slots.values())
    small = [f"{host} slots={count}" for host, count in slots.items() if count < launch.num_processes]
    if small:
        raise ConfigError(
            [
                Problem(
                    "launch.num_processes",
                    f"{launch.num_processes} ranks per machine, but {_hostfile(launch)} has {', '.join(small)}",
                )
            ]
        )
    return launch.num_processes * len(slots)


def deepspeed_command(launch: LaunchConfig, module: str, config_path: Path, scratch: Path) -> JobCommand:
    """DeepSpeed's runner over the hosts of launch.hostfile."""
    if not shutil.which("pdsh"):
        raise ConfigError([Problem("launch.hostfile", "needs the program pdsh to reach the machines; install pdsh")])
    port = free_port() if launch.master_port == "auto" else launch.master_port
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(_hostfile(launch)), "--force_multi"]
    argv += ["--master_port", str(port), "--no_local_rank"]
    if launch.num_processes != "auto":
        argv += ["--num_gpus", str(launch.num_processes)]
    argv += ["--module", module, str(config_path.resolve())]
    environment_file = scratch / "deepspeed_env"
    told = "".join(f"{key}={value}\n" for key, value in told_to_ranks(hostfile_world_size(launch)).items())
    environment_file.write_text(deepspeed_environment() + told, encoding="utf-8")
    # SIGTERM makes the runner end the ranks on every machine; killed, it would leave them behind.
    env = {"DS_ENV_FILE": str(environment_file)}
    return JobCommand(argv, env, shares_terminal=False, end_signal=signal.SIGTERM)


def deepspeed_environment() -> str:
    """Lines KEY=VALUE that the runner exports on every machine: the user's .deepspeed_env, then our own settings."""
    named = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    # The runner wraps values in double quotes for a shell and does not escape what is special inside them.
    plain = {k: v for k, v in sorted(os.environ.items()) if not set(v) & set('"$`\\\n')}
    own = {k: v for k, v in plain.items() if k.startswith(FORWARDED_PREFIXES)}
    users = dict(
        line.split("=", 1)
        for folder in (Path.home(), Path())
        if (folder / named).is_file()
        for line in (folder / named).read_text(encoding="utf-8").splitlines()
        if "=" in line
    )
    return "".join(f"{key}={value}\n" for key, value in {**own, **users}.items())


def slurm_nodes() -> int:
    """Machines of the allocation we are in; 0 outside of one."""
    return int(os.environ.get("SLURM_NNODES", "1")) if "SLURM_JOB_ID" in os.environ else 0


def slurm_world_size(launch: LaunchConfig) -> int:
    """Ranks over all machines of the allocation. Raises ConfigError outside of one, or when it is too small."""
    if not slurm_nodes():
        message = "slurm works inside an allocation only (sbatch or salloc); SLURM_JOB_ID is not set"
        raise ConfigError([Problem("launch.launcher", message)])
    ranks, cpus = slurm_ranks_per_node(launch), slurm_cpus_per_node()
    if 0 < cpus < ranks:
        message = (
            f"{ranks} ranks on a machine, but the allocation has {cpus} of its CPUs; ask sbatch for"
            f" --ntasks-per-node={ranks} --cpus-per-task=12 (or what a machine has for each), or for --exclusive"
        )
        raise ConfigError([Problem("launch.num_processes", message)])
    return slurm_nodes() * ranks


def slurm_ranks_per_node(launch: LaunchConfig) -> int:
    """Ranks on each machine of the allocation: as asked for, else its GPUs, else its tasks, else one."""
    if launch.num_processes != "auto":
        return launch.num_processes
    for variable in ("SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(variable, "").isdecimal():
            return max(1, int(os.environ[variable]))
    return max(1, visible_gpus())


def slurm_cpus_per_node() -> int:
    """CPUs on each machine of the allocation, where it has the fewest; 0 when Slurm does not tell."""
    listed = os.environ.get("SLURM_JOB_CPUS_PER_NODE") or os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min(map(int, re.findall(r"(?:^|,)(\d+)", listed)), default=0)  # "96(x2),64": two machines of 96, one of 64


def slurm_command(launch: LaunchConfig, module: str, config_path: Path) -> JobCommand:
    """srun over the whole allocation; each task finds its rank in Slurm's own variables."""
    world_size = slurm_world_size(launch)
    if not shutil.which("srun"):
        raise ConfigError([Problem("launch.launcher", "slurm needs the program srun, which is not on PATH")])
    ranks = slurm_ranks_per_node(launch)
    # ntasks: else srun takes the allocation's own number from SLURM_NTASKS and drops --ntasks-per-node (its opt.c).
    argv = ["srun", f"--nodes={slurm_nodes()}", f"--ntasks={world_size}", f"--ntasks-per-node={ranks}"]
    # overlap: the shell we run in may itself be a step that holds the resources.
    argv += ["--kill-on-bad-exit=1", "--input=none", "--quit-on-interrupt", "--overlap"]
    argv.append("--export=ALL")  # after sbatch --export=NONE srun would keep what we tell the ranks to itself
    if slurm_cpus_per_node():
        # srun gives a task one core unless told otherwise, since Slurm 22.05 also under sbatch --cpus-per-task.
        argv.append(f"--cpus-per-task={slurm_cpus_per_node() // ranks}")
    argv += [sys.executable, "-m", module, str(config_path.resolve())]
    port = free_port() if launch.master_port == "auto" else launch.master_port
    # With --quit-on-interrupt one SIGINT ends the step on all machines.
    env = {"MASTER_PORT": str(port), **told_to_ranks(world_size)}
    return JobCommand(argv, env, shares_terminal=False, end_signal=signal.SIGINT)


def describe(command: JobCommand) -> str:
    """The command as it could be typed, for the log."""
    return shlex.join([*(f"{k}={v}" for k, v in command.env.items()), *command.argv])


def _hostfile(launch: LaunchConfig) -> Path:
    assert launch.hostfile is not None, "the schema requires a hostfile for the deepspeed launcher"
    return Path(launch.hostfile).expanduser().resolve()


def _hostfile_problem(message: str) -> ConfigError:
    return ConfigError([Problem("launch.hostfile", message)])
