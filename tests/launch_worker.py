"""A rank without torch: `python -m tests.launch_worker CONFIG` does the deed that its config names."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import yaml

from rlhf_cli.errors import DataError
from rlhf_cli.runtime.process import RankProcess, end_rank, report_failure, start_rank


def train(me: RankProcess, run_dir: Path, seconds: float = 60) -> None:
    """A loop that saves when asked to stop."""
    me.watch.loop_started()
    (run_dir / f"in_loop_{me.rank}").touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if me.watch.requested:
            (run_dir / f"saved_{me.rank}").write_text(str(me.watch.requested))
            return
        time.sleep(0.01)


def act(deed: dict, me: RankProcess, run_dir: Path) -> None:
    (run_dir / f"pid_{me.rank}").write_text(str(os.getpid()))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    (run_dir / f"env_{me.rank}").write_text(yaml.safe_dump({name: os.environ.get(name) for name in names}))
    mine = me.rank == deed.get("rank", me.rank)
    match deed["do"]:
        case "talk":
            print("chatter on stdout")
            os.system("echo chatter from a child >&2")
            print(f"hello from rank {me.rank} tty={me.terminal.isatty()}", file=me.terminal, flush=True)
        case "crash" if mine:
            raise ValueError("the sum is odd")
        case "crash":
            while not (run_dir / "logs" / f"error_rank_{deed['rank']}.json").exists():
                time.sleep(0.01)  # a peer notices after the cause, and before the launcher ends it
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
        case "crash on stop":
            me.watch.loop_started()
            (run_dir / f"in_loop_{me.rank}").touch()
            while not me.watch.requested:
                time.sleep(0.01)
            raise OSError(28, "No space left on device")
        case "user error" if mine:
            raise DataError("data.path: rows.jsonl:3: no field 'prompt'; allowed: prompt, response")
        case "exit" if mine:
            print("last words before the exit", file=sys.stderr)
            os._exit(3)
        case "signal" if mine:
            time.sleep(0.2)
            os.kill(os.getpid(), deed["signal"])
        case "fork" if os.fork() == 0:
            (run_dir / f"pid_child_{me.rank}").write_text(str(os.getpid()))
            time.sleep(60)
        case "bar":
            bar(me)
        case "talk then train":
            train(me, run_dir)
            print("saving at a closed terminal", file=me.terminal, flush=True)
            return
        case "before loop" if mine:
            (run_dir / f"waiting_{me.rank}").touch()
            time.sleep(60)
            return
        case "before loop":  # ahead of the other, in a collective that it never joins
            me.watch.loop_started()
            (run_dir / f"waiting_{me.rank}").touch()
            time.sleep(60)
            return
    if deed["do"] not in ("talk", "bar"):
        train(me, run_dir)


def bar(me: RankProcess) -> None:
    """A rich progress bar as the loop draws it, with a message above it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=me.terminal, highlight=False)
    print(f"width={console.width} tty={console.is_terminal}")
    with Progress(console=console, refresh_per_second=20) as progress:
        task = progress.add_task("steps", total=3)
        for step in range(3):
            progress.console.print(f"message {step}")
            progress.advance(task)
            time.sleep(0.1)


def main() -> None:
    run_dir = Path(sys.argv[1]).parent
    me = start_rank(run_dir)
    try:
        act(yaml.safe_load(Path(sys.argv[1]).read_text()), me, run_dir)
    except Exception as error:
        end_rank(report_failure(run_dir, error))


if __name__ == "__main__":
    main()
