"""One run: from a checked configuration to a finished folder. Imports torch only once the configuration holds."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.config import ConfigError
from hybrid.data import Corpus, prepare
from hybrid.progress import RunProgress
from hybrid.records import RunFolder, describe_run, run_id
from hybrid.schema import Config, DisplayConfig
from hybrid.sizes import PARTS, count_params

# What a summary says of the training, None where it came to nothing.
OUTCOME = (
    "status", "stop_reason", "steps", "tokens", "best_val_loss", "best_step", "final_val_loss", "final_train_loss",
    "val_bits_per_byte", "grad_ratio", "gate_mean", "gates", "tokens_per_second", "peak_memory_bytes", "wall_seconds",
    "environment",
)  # fmt: skip
ENDED = ("completed", "stopped", "diverged")  # a run with such a record is not run again


class SweepFailed(RuntimeError):
    """Some runs of a sweep failed; the message is one line."""


@dataclass
class PlannedRun:
    """A run that is known by identity and place, before anything of it is computed."""

    cfg: Config
    corpus: Corpus
    run_id: str
    variant: str
    folder: RunFolder

    @property
    def status(self) -> str | None:
        """The status in the run's record; None while there is none."""
        summary = self.folder.summary()
        return summary.get("status") if summary is not None and summary.get("run_id") == self.run_id else None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


def check_data(cfg: Config) -> Corpus:
    """Prepare the corpus and fit the configuration to it.

    Raises ``hybrid.data.DataError`` or ``hybrid.config.ConfigError``.
    """
    corpus = prepare(cfg.data)
    fit_to_corpus(cfg, corpus)
    return corpus


def fit_to_corpus(cfg: Config, corpus: Corpus) -> None:
    """Fill in the vocabulary size and check the sizes that depend on it. Raises ``ConfigError``."""
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = corpus.vocab_size
    elif cfg.model.vocab_size < corpus.vocab_size:
        raise ConfigError(f"model.vocab_size={cfg.model.vocab_size} is below the tokenizer's {corpus.vocab_size}")
    count_params(cfg)


def plan(cfg: Config, corpus: Corpus, variant: str) -> PlannedRun:
    """Settle device, precision and kernels, and with them the run's identity and folder. Raises ``ConfigError``."""
    check_machine(cfg)
    from hybrid.device import resolve_device

    resolve_device(cfg)
    identifier = run_id(cfg, corpus)
    folder = RunFolder(cfg, identifier, variant)
    return PlannedRun(cfg, corpus, identifier, folder.variant, folder)


def check_machine(cfg: Config) -> None:
    """What can be said of the device without importing torch. Raises ``ConfigError``."""
    cuda = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or sys.platform != "linux"
    if cfg.trainer.device.startswith("cuda") and not cuda:
        raise ConfigError(f"trainer.device={cfg.trainer.device}: not one of the 0 CUDA devices here; use cpu or auto")
    for op in ("wkv6", "ssd"):
        backend = getattr(cfg.kernels, op)
        if backend not in ("auto", "torch") and (cfg.trainer.device == "cpu" or not cuda):
            raise ConfigError(f"kernels.{op}: the {backend} kernels need a CUDA device; use torch or auto")


def execute(
    run: PlannedRun,
    overrides: list[str],
    judge: Callable[[int, float], str | None] | None = None,
    trial: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, or return the record if the run has ended before.

    ``judge`` sees every evaluation and may stop the run (``hybrid.training.loop.Judge``); ``trial`` is the search that
    the run belongs to, for its record. Whatever happens is in the summary: an error ends the run as ``failed`` with
    its reason, and the traceback in the log. Raises ``RunBusy`` where another process is at it, and lets Ctrl-C
    through.
    """
    cfg, folder = run.cfg, run.folder
    with folder.lock():
        if run.ended:
            folder.remove_steps()  # in case the process died just before it did
            return folder.summary()
        (folder.path / "summary.json").unlink(missing_ok=True)
        folder.create(cfg, run.corpus)
        about = describe_run(cfg, run.corpus, run.run_id, run.variant, overrides)
        if trial is not None:
            about["trial"] = trial
        progress = RunProgress(f"{run.variant} seed {cfg.seed_init}", cfg.trainer.max_steps, cfg.display, folder.note)
        with progress:
            folder.note(parameter_table(cfg))
            if run.corpus.unknown_in_val:
                progress.message(f"{run.corpus.unknown_in_val} validation characters are not in the training text")
            asked_to_stop = False
            try:
                outcome, asked_to_stop = train(run, progress, judge)
            except OSError as error:  # a full or missing disk says nothing about the run: it stays unfinished
                progress.message(f"unfinished: {error}")
                raise
            except Exception as error:
                folder.note(traceback.format_exc())
                said = str(error).strip().splitlines() or [""]
                reason = f"{type(error).__name__}: {said[0]}"
                outcome = dict.fromkeys(OUTCOME) | {"status": "failed", "stop_reason": reason}
            if outcome["status"] != "completed":
                progress.message(f"{outcome['status']}: {outcome['stop_reason']} (log: {folder.log})")
        folder.write_summary(about | outcome)
        if outcome["status"] in ENDED:  # only now: until the summary stands, a restart goes on from the checkpoint
            folder.remove_steps()
        if asked_to_stop:
            raise KeyboardInterrupt("stopped after the last step; this run is done")
        return folder.summary()


def probe(run: PlannedRun, steps: int = 3) -> float:
    """Seconds that the run would take, from a few of its training steps and one validation batch. Writes nothing."""
    from hybrid.training.loop import Trainer

    silent = RunProgress(run.variant, run.cfg.trainer.max_steps, DisplayConfig(progress="off"), lambda _: None)
    return Trainer(run.cfg, run.corpus, run.folder, silent).estimate(steps)


def train(
    run: PlannedRun, progress: RunProgress, judge: Callable[[int, float], str | None] | None = None
) -> tuple[dict[str, Any], bool]:
    """The outcome of training from the newest checkpoint that can be read, and whether Ctrl-C came at its end."""
    from hybrid.training.checkpoint import DamagedCheckpoint
    from hybrid.training.loop import Trainer

    while True:
        trainer = Trainer(run.cfg, run.corpus, run.folder, progress, judge)
        run.folder.note(f"kernels: {trainer.environment['kernels']}, device: {trainer.environment['device']}")
        if run.cfg.trainer.device != "cpu" and "torch" in trainer.environment["kernels"].values():
            progress.message("slow: a Triton kernel is not installed, plain PyTorch serves instead (see the log)")
        try:
            return trainer.train(), trainer.asked_to_stop
        except DamagedCheckpoint as error:
            progress.message(str(error))


def parameter_table(cfg: Config) -> str:
    """Parameters by part, a line each."""
    counts = count_params(cfg)
    rows = [f"{part:<10}{counts[part]:>12,}  {counts[part] / counts['total']:>6.1%}" for part in PARTS if counts[part]]
    return "parameters\n" + "\n".join(rows)
