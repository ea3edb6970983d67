"""One run: from a checked configuration to a finished folder. Imports torch only once the configuration holds."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from hybrid.config import Config, ConfigError
from hybrid.data import Corpus, prepare
from hybrid.progress import RunProgress
from hybrid.records import RunFolder, describe_run, run_id
from hybrid.sizes import PARTS, count_params

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
    def ended(self) -> bool:
        summary = self.folder.summary()
        return summary is not None and summary.get("status") in ENDED and summary.get("run_id") == self.run_id


def check_data(cfg: Config) -> Corpus:
    """Prepare the corpus, fill in the vocabulary size and check the sizes that depend on it.

    Raises ``hybrid.data.DataError`` or ``hybrid.config.ConfigError``.
    """
    corpus = prepare(cfg.data)
    if cfg.model.vocab_size is None:
        cfg.model.vocab_size = corpus.vocab_size
    elif cfg.model.vocab_size < corpus.vocab_size:
        raise ConfigError(f"model.vocab_size={cfg.model.vocab_size} is below the tokenizer's {corpus.vocab_size}")
    count_params(cfg)
    return corpus


def plan(cfg: Config, corpus: Corpus, variant: str) -> PlannedRun:
    """Settle device and precision, and with them the run's identity and folder."""
    from hybrid.device import resolve_device

    resolve_device(cfg)
    identifier = run_id(cfg, corpus)
    return PlannedRun(cfg, corpus, identifier, variant, RunFolder(cfg, identifier, variant))


def execute(run: PlannedRun, overrides: list[str]) -> dict[str, Any]:
    """Train, or return the record if the run has ended before.

    Whatever happens is in the summary: an error ends the run as ``failed`` with its reason, and the traceback in the
    log. Raises ``RunBusy`` where another process is at it, and lets Ctrl-C through.
    """
    cfg, folder = run.cfg, run.folder
    with folder.lock():
        if run.ended:
            return folder.summary()
        (folder.path / "summary.json").unlink(missing_ok=True)
        folder.create(cfg, run.corpus)
        about = describe_run(cfg, run.corpus, run.run_id, run.variant, overrides)
        progress = RunProgress(f"{run.variant} seed {cfg.seed_init}", cfg.trainer.max_steps, cfg.display, folder.note)
        with progress:
            folder.note(parameter_table(cfg))
            if run.corpus.unknown_in_val:
                progress.message(f"{run.corpus.unknown_in_val} validation characters are not in the training text")
            outcome: dict[str, Any]
            try:
                from hybrid.training.loop import Trainer

                trainer = Trainer(cfg, run.corpus, folder, progress)
                folder.note(f"kernels: {trainer.environment['kernels']}, device: {trainer.environment['device']}")
                outcome = trainer.train()
            except Exception as error:
                folder.note(traceback.format_exc())
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                outcome = {"status": "failed", "stop_reason": reason}
            if outcome["status"] != "completed":
                progress.message(f"{outcome['status']}: {outcome['stop_reason']} (log: {folder.log})")
        summary = about | outcome
        folder.write_summary(summary)
        return folder.summary() or summary


def parameter_table(cfg: Config) -> str:
    """Parameters by part, a line each."""
    counts = count_params(cfg)
    rows = [f"{part:<10}{counts[part]:>12,}  {counts[part] / counts['total']:>6.1%}" for part in PARTS if counts[part]]
    return "parameters\n" + "\n".join(rows)
