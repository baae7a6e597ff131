#!/usr/bin/env python3
"""Stands in for srun: the tasks of every node run here, with Slurm's variables, and errors read like srun's."""

import os
import signal
import subprocess
import sys
import time

options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
nodes = int(options["nodes"])
# --ntasks-per-node counts only where nothing says --ntasks, and sbatch has said it in the environment.
count = int(options.get("ntasks") or os.environ.get("SLURM_NTASKS") or nodes * int(options["ntasks-per-node"]))
per_node = -(-count // nodes)
cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", sys.maxsize))
if per_node * int(options.get("cpus-per-task", 1)) > cpus:
    print("srun: error: Unable to create step: More processors requested than permitted", file=sys.stderr)
    sys.exit(1)
tasks = []
for task in range(count):
    slurm = {"SLURM_PROCID": task, "SLURM_LOCALID": task % per_node, "SLURM_NTASKS": count}
    env = os.environ | {name: str(value) for name, value in slurm.items()} | {"SLURM_STEP_NODELIST": "localhost"}
    tasks.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL))


def send(signum):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(signum)


def interrupt(signum, frame):  # --quit-on-interrupt
    send(signal.SIGKILL)
    sys.exit(130)


signal.signal(signal.SIGTERM, lambda signum, frame: send(signum))  # srun forwards it
signal.signal(signal.SIGINT, interrupt)
reported = set()
while any(task.poll() is None for task in tasks):
    for index, task in enumerate(tasks):
        if task.poll() and index not in reported:
            code = task.returncode
            words = {-9: "Killed", -15: "Terminated"}.get(code, f"Exited with exit code {code}")
            print(f"srun: error: node0: task {index}: {words}", file=sys.stderr, flush=True)
            if not reported:
                send(signal.SIGTERM)  # --kill-on-bad-exit
                time.sleep(1)
                send(signal.SIGKILL)  # KillWait, shortened
            reported.add(index)
    time.sleep(0.02)
sys.exit(max(abs(task.returncode) for task in tasks))
