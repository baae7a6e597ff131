"""One machine: torch elastic's agent, also for one rank, so that logs and signals are the same for any number."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from rlhf_cli.jobfiles import FRONT_PID_VARIABLE, TERMINAL_FD_VARIABLE
from rlhf_cli.launch.command import JobCommand, told_to_ranks
from rlhf_cli.launch.devices import threads_per_rank
from rlhf_cli.schema import LaunchConfig

# Turns that a thread of GNU OpenMP waits for the others before it sleeps, some tens of microseconds. By default it is
# milliseconds, so that two runs, or a run and a browser, on the same cores hold each other up: measured with two runs
# of two threads on two cores, 58 s for what takes 17 s with this, and 6 s alone with or without it.
SPINS = "10000"


def elastic_command(launch: LaunchConfig, ranks: int, module: str, config_path: Path, scratch: Path) -> JobCommand:
    """The agent's command. scratch: a directory for the agent's own files, gone after the job."""
    rendezvous, notes = _rendezvous(launch)
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *rendezvous]
    argv += ["--local-addr", "localhost", "--max-restarts", "0", "--log-dir", str(scratch)]
    argv += ["--module", module, str(config_path)]
    env = {FRONT_PID_VARIABLE: str(os.getpid()), TERMINAL_FD_VARIABLE: "0", **told_to_ranks(ranks)}
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(threads_per_rank(ranks))
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        env["GOMP_SPINCOUNT"] = SPINS
    # The agent passes SIGTERM on and then waits 30 s; ranks ask the kernel to end with it, so SIGKILL is the short way.
    return JobCommand(argv, env, shares_terminal=True, end_signal=signal.SIGKILL, notes=notes)


def _rendezvous(launch: LaunchConfig) -> tuple[list[str], tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if launch.master_port != "auto":
        if port_is_free(launch.master_port):
            # Only the static rendezvous gives rank 0 the port asked for; c10d would choose another beside it.
            static = ["--rdzv-backend", "static", "--master-addr", "localhost"]
            return [*static, "--master-port", str(launch.master_port)], notes
        notes = (f"launch.master_port: {launch.master_port} is taken; using a free port instead",)
    # Port 0 is bound by the agent itself: nobody can take it between a look and the use.
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"], notes


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of this machine."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
