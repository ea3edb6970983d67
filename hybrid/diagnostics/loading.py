"""A trained run as what is diagnosed: its model, its corpus and its record. Raises ``ConfigError`` or ``DataError``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.config import ConfigError
from hybrid.data import Corpus, DataError
from hybrid.generate import find, load
from hybrid.records import read_summary
from hybrid.run import check_data
from hybrid.schema import Config

if TYPE_CHECKING:
    from hybrid.model import HybridLM

CHECKPOINTS = ("best", "final")
WITH_WEIGHTS = ("completed", "stopped")  # statuses of runs that a sweep's diagnosis takes


@dataclass(frozen=True)
class Run:
    """A finished run in its folder, before its data and weights are read."""

    folder: Path
    summary: dict[str, Any]
    weights: Path
    step: int | None  # of the weights
    weights_sha256: str


@dataclass(frozen=True)
class Trained:
    """A run with everything in memory; the model is on its device, in evaluation mode."""

    cfg: Config
    corpus: Corpus
    model: HybridLM


def find_runs(path: Path) -> tuple[list[Path], list[str]]:
    """The folder itself if it is a run's, else those of the finished runs in it; and words about those left out."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder; give a run's or a sweep's, e.g. outputs/smoke")
    if (path / "config.yaml").exists():
        return [path], []
    found, left_out = [], []
    for folder in sorted(file.parent for file in path.glob("*/config.yaml")):
        status = (read_summary(folder) or {}).get("status", "not finished")
        if status in WITH_WEIGHTS:
            found.append(folder)
        else:
            left_out.append(f"{folder} is left out: {status}")
    if not found:
        raise ConfigError(f"{path} holds no finished run; give a run's or a sweep's folder")
    return found, left_out


def open_run(folder: Path, checkpoint: str) -> Run:
    """The run's record and the weights that ``checkpoint`` ("best" or "final") names."""
    summary = read_summary(folder)
    if summary is None:
        raise ConfigError(f"{folder} is not finished: it has no summary.json that can be read")
    weights = folder / "checkpoints" / f"{checkpoint}.safetensors"
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{folder} has no weights checkpoints/{weights.name} ({error.strerror})") from error
    return Run(folder, summary, weights, summary.get("best_step" if checkpoint == "best" else "steps"), digest)


def load_run(run: Run, device: str) -> Trained:
    """Read configuration, text and weights; text and vocabulary must be those that the run was trained on."""
    cfg, tokenizer, weights = find(run.weights)
    corpus = check_data(cfg)
    trained_on = run.summary.get("data") or {}
    if corpus.sha256 != trained_on.get("sha256"):
        raise DataError(f"{run.folder} was trained on another text than data={cfg.data.name} is here now")
    if corpus.tokenizer.sha256 != tokenizer.sha256:
        raise DataError(f"{run.folder} was trained with another vocabulary (tokenizer.json) than its text gives now")
    return Trained(cfg, corpus, load(cfg, weights, device))
