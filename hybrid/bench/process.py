"""Measures the task that standard input holds: the process that ``hybrid.bench.task`` starts for a row."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from hybrid.arguments import plain_key
from hybrid.bench.task import Row, Task, one_line
from hybrid.start import import_torch, import_training, keep_imports


def main() -> None:
    order = json.load(sys.stdin)
    task = Task(**order["task"])
    try:
        row = measure(task, order["begun"])
    except Exception as error:
        row = task.failed(one_line(error), stderr=traceback.format_exc().splitlines()[-30:])
    Path(order["answer"]).write_text(json.dumps(row))


def measure(task: Task, begun: float) -> Row:
    """The row of a task, after imports in the order in which ``hybrid.train`` has them."""
    keep_imports()
    import_torch(asked_device(task.overrides))
    if task.kind == "steps":
        import_training(device_of(task.overrides))
    from hybrid.bench import worker

    return worker.measure(task, begun)


def asked_device(overrides: list[str]) -> str:
    """What the overrides say of ``trainer.device``."""
    found = [override.partition("=")[2] for override in overrides if plain_key(override) == "trainer.device"]
    return found[-1] if found else "auto"


def device_of(overrides: list[str]) -> str:
    """What ``trainer.device`` will be."""
    import torch

    asked = asked_device(overrides)
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
