"""One row of a benchmark: what to measure, and measuring it here or in a process of its own. Imports no torch.

Every row has its own process: an error on the device, a hang or what another row left in memory and caches of compiled
code cannot touch it, and the time to its first step is that of a fresh start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]  # what a measured row says; see ``hybrid.bench.document``


@dataclass
class Task:
    """A training to be timed (kind "steps") or the device to be asked (kind "device")."""

    group: str  # rows of one group are compared with each other
    name: str
    overrides: list[str] = field(default_factory=list)  # of the configuration
    members: int = 1  # runs trained together, seeds 0 to members-1
    loss_steps: int = 100  # steps before the timing begins; their losses are compared
    repeats: int = 5
    seconds: float = 0.5  # of one repeat, at least
    memory_limit: int | None = None  # bytes that the process may take on the device
    kind: str = "steps"

    def failed(self, reason: str, **more: Any) -> Row:
        return {"group": self.group, "name": self.name, "status": "failed", "reason": reason, **more}


@dataclass
class Runner:
    """Measures tasks. ``isolated``: each in a process of its own, which may take ``timeout`` seconds.

    ``cold``: each with empty caches of compiled kernels.
    """

    isolated: bool
    timeout: float = 600.0
    cold: bool = False

    def __call__(self, task: Task) -> Row:
        """The row of a task; whatever goes wrong is in its ``status`` and ``reason``."""
        if self.isolated:
            return self._elsewhere(task)
        from hybrid.bench.worker import measure

        try:
            row = measure(task, time.time())
        except Exception as error:
            return task.failed(one_line(error))
        if row.get("options", {}).get("device") == "cpu":  # a process keeps what it once had, so later rows see none
            row["peak_memory_bytes"] = None
        return row

    def _elsewhere(self, task: Task) -> Row:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            answer = Path(folder) / "row.json"
            environ = os.environ | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            }
            if self.cold:
                environ |= {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            order = json.dumps({"task": asdict(task), "begun": time.time(), "answer": str(answer)})
            command = [sys.executable, "-m", "hybrid.bench.process"]
            try:
                done = subprocess.run(
                    command, input=order, text=True, capture_output=True, env=environ, timeout=self.timeout
                )
            except subprocess.TimeoutExpired:
                return task.failed(f"not done within {self.timeout:g} s")
            try:
                return json.loads(answer.read_text())
            except (OSError, ValueError):
                said = done.stderr.strip().splitlines()
                return task.failed(said[-1] if said else f"ended with status {done.returncode}", stderr=said[-30:])


def one_line(error: BaseException) -> str:
    """Type and first line of an error; where memory ran out, of that and not of what it led to."""
    cause: BaseException | None = error
    while cause is not None and type(cause).__name__ != "OutOfMemoryError":
        cause = cause.__cause__ or cause.__context__
    said = str(cause or error).strip().splitlines() or [""]
    return f"{type(cause or error).__name__}: {said[0]}"
