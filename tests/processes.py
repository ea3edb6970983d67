"""What the tests of sweeps see of processes and of runs that are going on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def metrics_steps(root: Path) -> dict[str, int]:
    """The last logged step of each run that has begun to train."""
    steps = {}
    for path in root.glob("*/metrics.jsonl"):
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            steps[path.parent.name] = json.loads(lines[-1])["step"]
    return steps


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that are there and no zombies."""
    left = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            left.append(pid)
    return left


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in path.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def holder(process: subprocess.Popen[str], pattern: str) -> int | None:
    """The child of the sweep that has the lock file of a run folder of this name open."""
    for pid in descendants(process.pid):
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if Path(os.readlink(handle)).match(f"{pattern}/lock"):
                    return pid
    return None


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.02)
