"""What a run leaves behind: its folder, its identity, its log and its summary. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid.config import identity, to_yaml
from hybrid.data import Corpus
from hybrid.files import write_text_atomically
from hybrid.pattern import parse_pattern
from hybrid.schema import Config

SCHEMA = "groundthink.run/1"
PACKAGE = Path(__file__).resolve().parent


# Sources that no result depends on.
NOT_RESULTS = (
    "progress.py", "start.py", "generate.py", "memory.py", "monitor.py", "profile.py", "training/board.py", "bench/",
    "arguments.py", "diagnose.py", "diagnostics/", "gates/__main__.py", "gates/trial.py", "gates/table.py",
)  # fmt: skip


class RunBusy(RuntimeError):
    """Another process is working in this run folder; the message is one line."""


@functools.cache
def code_version() -> str:
    """A hash of the sources that a result depends on: two runs of one configuration compare only if it agrees."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix().startswith(NOT_RESULTS):
            continue
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def run_id(cfg: Config, corpus: Corpus) -> str:
    """A hash of everything that can change the result: configuration, text, tokenizer, code."""
    facts = {
        "config": identity(cfg),
        "data": corpus.sha256,
        "tokenizer": corpus.tokenizer.sha256,
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def variant_name(cfg: Config, overrides: list[str]) -> str:
    """The arm's name: as configured, else model and fusion with the options that were overridden.

    Data, trainer, seeds and paths name no arm: ``fusion=gated fusion.gate_init=0.5 optim.lr=1e-3`` becomes
    ``hybrid_5m-gated-gate_init=0.5-lr=1e-3``.
    """
    if cfg.variant:
        return safe_name(cfg.variant) or "unnamed"
    words = [cfg.model.name, cfg.fusion.name] if "P" in parse_pattern(cfg.model.pattern) else [cfg.model.name]
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        parent, _, leaf = key.rpartition(".")
        if parent.split(".")[0] in ("model", "fusion", "optim", "schedule"):
            words.append(f"{leaf}={value}")
        elif key == "init":
            words.append(value)
    return safe_name("-".join(words))


def safe_name(text: str) -> str:
    """A folder name: letters, digits and ``._=+-`` only; empty if the text has none of them.

    At most 80 bytes: a longer one is cut and ends in a hash of the whole.
    """
    name = re.sub(r"[^\w.=+-]+", "_", text).strip("._")
    if len(name.encode()) > 80:
        name = f"{name.encode()[:71].decode(errors='ignore')}-{short_hash(text)}"
    return name


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class RunFolder:
    """``{out}/{sweep}/{variant}-{8 of run_id}``: one folder per run, never used by another configuration."""

    def __init__(self, cfg: Config, identifier: str, variant: str) -> None:
        root = Path(cfg.out).expanduser() / (cfg.sweep.name or "single")
        self.path = root / f"{variant}-{identifier[:8]}"
        if not self.path.exists():  # the same run may be there under another name, from a wider sweep, say
            others = [path for path in root.glob(f"*-{identifier[:8]}") if (path / "config.yaml").exists()]
            self.path = others[0] if len(others) == 1 else self.path
        self.variant = self.path.name.removesuffix(f"-{identifier[:8]}")
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.probes = self.path / "probe.jsonl"  # apart: rows of many numbers that few readers want
        self.log = self.path / "log.txt"

    def create(self, cfg: Config, corpus: Corpus) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.rglob("*.partial"):  # of a process that was killed while it wrote
            leftover.unlink()
        write_text_atomically(self.path / "config.yaml", to_yaml(cfg))
        corpus.tokenizer.save(self.path / "tokenizer.json")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder. Raises ``RunBusy`` if another process does; a killed process holds nothing."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as handle:
            for attempt in range(5):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if attempt == 4:
                        raise RunBusy(f"{self.path} is being run by another process") from error
                    time.sleep(0.05)  # it may only be someone who looks whether it is free (``busy``)
            yield

    @property
    def busy(self) -> bool:
        """Whether a process holds the folder right now."""
        if not self.path.exists():
            return False
        try:
            with self.lock():
                return False
        except RunBusy:
            return True

    def summary(self) -> dict[str, Any] | None:
        """The record of an ended run, None while there is none that can be read."""
        return read_summary(self.path)

    def append(self, row: dict[str, Any]) -> None:
        with (self.probes if row.get("kind") == "probe" else self.metrics).open("a") as handle:
            handle.write(json.dumps(finite(row)) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """What has been logged, in order, without lines that cannot be read."""
        rows = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
        return rows

    def forget_after(self, step: int) -> None:
        """Drop the logged steps that a resumed run will log again, and a line torn by the interruption."""
        for path in (self.metrics, self.probes):
            if not path.exists():
                continue
            kept = []
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
            write_text_atomically(path, "".join(kept))

    def note(self, text: str) -> None:
        with self.log.open("a") as handle:
            handle.write(text.rstrip("\n") + "\n")

    def remove_steps(self) -> None:
        """Drop what only resuming needs; an ended run keeps its weights."""
        for step in self.checkpoints.glob("step-*"):
            remove_step(step)
        for partial in self.checkpoints.glob("partial-*"):
            shutil.rmtree(partial)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_text_atomically(
            self.path / "summary.json", json.dumps(finite({"schema": SCHEMA, **summary}), indent=1) + "\n"
        )


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The record of the run in a folder, None while there is none that can be read."""
    try:
        found = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def remove_step(step: Path) -> None:
    """Delete a checkpoint's folder; a death on the way leaves no folder that looks whole."""
    doomed = step.with_name(f"partial-{step.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    step.rename(doomed)
    shutil.rmtree(doomed)


def finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_run(cfg: Config, corpus: Corpus, identifier: str, variant: str, overrides: list[str]) -> dict[str, Any]:
    """The part of a summary that is known before the first step."""
    from hybrid.sizes import count_params, flops_per_token, state_floats_per_layer

    return {
        "run_id": identifier,
        "variant": variant,
        "sweep": cfg.sweep.name,
        "overrides": overrides,
        "seed_init": cfg.seed_init,
        "seed_data": cfg.seed_data,
        "params": count_params(cfg),
        "state_floats_per_layer": state_floats_per_layer(cfg),
        "flops_per_token": flops_per_token(cfg),
        "data": corpus.describe() | {"seq_len": cfg.data.seq_len},
    }


def environment(device: str, kernels: dict[str, str]) -> dict[str, Any]:
    """What a run was made with: versions, device, kernel backends, git state, code version."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "flash-linear-attention", "mamba-ssm", "causal-conv1d", "hydra-core", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = _git("rev-parse", "HEAD")
    return {
        "versions": versions,
        "device": device,
        "kernels": kernels,
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(_git("status", "--porcelain", "--", ".")),
        "code_version": code_version(),
    }


@functools.cache
def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
