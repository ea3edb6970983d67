"""What the tests of training, records and sweeps share: a small model on real text, run here or by the command line."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from hybrid.config import CONF_DIR, resolve
from hybrid.records import RunFolder, variant_name
from hybrid.run import PlannedRun, check_data, execute, plan
from hybrid.schema import Config

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"tokens_per_second", "memory_bytes", "wall_seconds"}  # of a metrics row: what differs from run to run

# One parallel block of 23,453 parameters, 12 steps of 4 x 32 characters. A test adds data.path, data.cache_dir, out.
SMALL = [
    "model=tiny", "model.pattern=P", "model.d_model=32", "model.rwkv.num_heads=2", "model.rwkv.shift_low_rank=4",
    "model.rwkv.decay_low_rank=4", "model.mamba.state_size=8", "model.mamba.head_dim=16", "data=text",
    "data.seq_len=32", "optim.lr=0.003", "schedule.warmup_steps=2", "trainer.max_steps=12", "trainer.batch_size=4",
    "trainer.grad_accum=1", "trainer.eval_every=6", "trainer.log_every=3", "trainer.checkpoint_every=3",
    "trainer.device=cpu",
]  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: no handler of the code under test catches it."""


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Setting:
    """The overrides of the small run, and where its records go."""

    overrides: tuple[str, ...]
    out: Path

    def with_(self, *more: str) -> list[str]:
        return [*self.overrides, *more]

    def config(self, *more: str) -> Config:
        return compose_config(self.with_(*more))

    def plan(self, *more: str) -> PlannedRun:
        """The run that ``python -m hybrid.train`` would make of the same overrides."""
        cfg = self.config(*more)
        return plan(cfg, check_data(cfg), variant_name(cfg, self.with_(*more)))

    def run(self, *more: str) -> tuple[RunFolder, dict[str, Any]]:
        """Train here; the folder and the summary."""
        planned = self.plan("display.progress=off", *more)
        return planned.folder, execute(planned, self.with_(*more))


def compose_config(overrides: list[str]) -> Config:
    """A checked configuration from command-line overrides, as Hydra composes it."""
    own, rest = {}, []
    for override in overrides:  # paths differ from test to test: set afterwards, so that composing can be shared
        key, _, value = override.partition("=")
        if key in ("out", "data.path", "data.cache_dir"):
            own[key] = value
        else:
            rest.append(override)
    cfg = copy.deepcopy(_composed(tuple(rest)))
    cfg.out = own.get("out", cfg.out)
    cfg.data.path = own.get("data.path", cfg.data.path)
    cfg.data.cache_dir = own.get("data.cache_dir", cfg.data.cache_dir)
    return cfg


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose("config", overrides=list(overrides)))


def strict_json(text: str) -> Any:
    """JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def rows(folder: RunFolder | Path) -> list[dict[str, Any]]:
    """The metrics of a run, in order, without what is measured by the clock."""
    path = folder.path if isinstance(folder, RunFolder) else folder
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in strict_json(line).items() if key not in TIMINGS} for line in lines]


def weights(folder: RunFolder | Path, name: str = "final") -> dict[str, Any]:
    """The tensors of a run's checkpoint."""
    from safetensors.torch import load_file

    path = folder.path if isinstance(folder, RunFolder) else folder
    return load_file(path / "checkpoints" / f"{name}.safetensors")


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def results(summary: dict[str, Any]) -> dict[str, Any]:
    """The part of a summary that a repetition of the run must repeat exactly."""
    keys = ("run_id", "status", "steps", "tokens", "best_val_loss", "best_step", "final_val_loss", "final_train_loss",
            "val_bits_per_byte", "grad_ratio", "params", "data")  # fmt: skip
    return {key: summary[key] for key in keys}


def cli(overrides: list[str], *options: str, columns: int = 200) -> Answer:
    """``hybrid.train.main`` in this process. Exceptions other than SystemExit come through."""
    from hybrid.train import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["hybrid.train"]),
        mock.patch.dict(os.environ, {"COLUMNS": str(columns)}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([*options, *overrides])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Answer(code, out.getvalue(), err.getvalue())


def command(overrides: list[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "hybrid.train", *options, *overrides]


def start(overrides: list[str], *options: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, on one thread."""
    return subprocess.Popen(
        command(overrides, *options),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Answer:
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    return Answer(process.returncode, out, err)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return as soon as ``condition`` holds; fail if ``process`` ends before."""
    deadline = time.monotonic() + 200
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"not reached before the process ended: {finish(process)}")
        time.sleep(0.003)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below ``folder`` with its inode, time of change and content; the lock may be touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }
