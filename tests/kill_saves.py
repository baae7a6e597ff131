"""Run as a program by test_checkpoint.py: processes that save checkpoints until they are killed, one after the other.

Imports torch once and forks for each of them. Prints one JSON line per killed process:
{"done": the last step whose save returned, "found": the step newest_valid finds then, "content": what it holds,
"leftovers": temporary names before newest_valid tidied up}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from rlhf_cli.runtime import checkpoint, distributed


def save_forever(root: Path, progress: Path, first: int) -> None:
    ranks = distributed.init(timeout_seconds=60.0)
    for step in range(first, first + 10_000):

        def write(directory: Path, step: int = step) -> None:
            for part in range(5):
                (directory / f"part-{part}").write_bytes(f"{step} {part} ".encode() * 20_000)

        checkpoint.save(root, step, ranks, {"engine": write}, {"step": step}, keep=1, bytes_needed=10**6)
        with progress.open("a") as file:
            file.write(f"{step}\n")


def kill_at(call: str, number: int, after: bool) -> None:
    """Make this process kill itself around the number-th call of os.<call> in checkpoint."""
    original, calls = getattr(os, call), 0

    def deadly(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args)
        if calls == number and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(checkpoint.os, call, deadly)


def trial(root: Path, first: int, kill: str | float) -> None:
    progress = root.parent / "progress"
    progress.write_text("")
    pid = os.fork()
    if pid == 0:
        sys.stdout.flush()
        if isinstance(kill, str):
            call, number, after = kill.split()
            kill_at(call, int(number), after == "after")
        save_forever(root, progress, first)
        os._exit(0)
    if isinstance(kill, float):
        while not progress.read_text():
            time.sleep(0.002)
        time.sleep(kill)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    leftovers = sorted(p.name for p in (root / "checkpoints").glob(".*"))
    path = checkpoint.newest_valid(root, lambda message: print(message, file=sys.stderr))
    done = [int(line) for line in progress.read_text().split()]
    found, content = None, None
    if path is not None:
        found = int(path.name.removeprefix("step_"))
        content = json.loads((path / "loop_state.json").read_text())["loop"]["step"]
        for part in range(5):
            assert (path / "engine" / f"part-{part}").read_bytes() == f"{found} {part} ".encode() * 20_000
    after = sorted(p.name for p in (root / "checkpoints").glob(".*"))
    assert after == [], after
    print(
        json.dumps({"done": done[-1] if done else None, "found": found, "content": content, "leftovers": leftovers}),
        flush=True,
    )


def main() -> None:
    root = Path(sys.argv[1])
    generator = random.Random(0)
    for kill in json.loads(sys.argv[2]):
        # A few trials start again at the step that exists, as a run does that was killed right after a save.
        newest = checkpoint.newest_valid(root, print)
        first = 1 if newest is None else int(newest.name.removeprefix("step_"))
        trial(root, first, generator.uniform(0.0, 0.1) if kill == "random" else kill)


if __name__ == "__main__":
    main()
