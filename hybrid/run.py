"""One run, or several that train as one: from checked configurations to finished folders.

Imports torch only once the configurations hold.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.config import ConfigError, used_parts
from hybrid.data import Corpus, prepare
from hybrid.progress import RunProgress
from hybrid.records import RunBusy, RunFolder, describe_run, run_id
from hybrid.schema import Config, DisplayConfig
from hybrid.sizes import PARTS, count_params
from hybrid.start import import_torch, import_training
from hybrid.stopping.settings import acts

# What a summary says of the training, None where it came to nothing.
OUTCOME = (
    "status", "stop_reason", "steps", "tokens", "best_val_loss", "best_step", "final_val_loss", "final_train_loss",
    "val_bits_per_byte", "grad_ratio", "gate_mean", "gates", "stopping", "tokens_per_second", "peak_memory_bytes",
    "wall_seconds", "environment",
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
    """Settle device, precision, kernels and whether stopping rules act, and with them the run's identity and folder.

    Raises ``ConfigError``.
    """
    check_machine(cfg)
    import_torch(cfg.trainer.device)
    from hybrid.device import resolve_device

    resolve_device(cfg)
    cfg.stopping.act = acts(cfg)
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

    ``judge`` sees every evaluation and may stop the run (``hybrid.training.member.Judge``); ``trial`` is the search
    that the run belongs to, for its record. Whatever happens is in the summary: an error ends the run as ``failed``
    with its reason, and the traceback in the log. Raises ``RunBusy`` where another process is at it, and lets Ctrl-C
    through.
    """
    with run.folder.lock():
        if run.ended:
            run.folder.remove_steps()  # in case the process died just before it did
            return run.folder.summary()
        job = Job(run, overrides, judge, trial)
        with job.progress:
            outcomes, asked_to_stop = attempt([job])
            job.finish(outcomes[0])
        if asked_to_stop:
            raise KeyboardInterrupt("stopped after the last step; this run is done")
        return run.folder.summary()


def execute_together(runs: list[PlannedRun], overrides: list[list[str]]) -> list[dict[str, Any] | None]:
    """The same for runs that differ by seeds or learning rates, trained as one; None for one that is run elsewhere.

    Runs whose checkpoints are at different steps go on in several groups. Where training them together fails, they
    are tried one by one, so that each gets the record that it would have alone.
    """
    with contextlib.ExitStack() as locks:
        jobs = []
        for run, lines in zip(runs, overrides, strict=True):
            try:
                locks.enter_context(run.folder.lock())
            except RunBusy as error:
                print(error, flush=True)  # someone else's sweep is at it; this one goes on with the others
                continue
            if run.ended:
                run.folder.remove_steps()
            else:
                jobs.append(Job(run, lines, place=len(jobs)))
        groups: dict[str, list[Job]] = {}
        for job in jobs:
            groups.setdefault(
                max((path.name for path in job.run.folder.checkpoints.glob("step-*")), default=""), []
            ).append(job)
        for group in groups.values():
            with contextlib.ExitStack() as shown:
                for job in group:
                    shown.enter_context(job.progress)
                outcomes, asked_to_stop = attempt(group)
                for job, outcome in zip(group, outcomes, strict=True):
                    if outcome["status"] == "failed" and len(group) > 1:
                        job.progress.message(f"tried alone after {outcome['stop_reason']}")
                        (outcome,), asked_to_stop = attempt([job])
                    job.finish(outcome)
            if asked_to_stop:
                raise KeyboardInterrupt("stopped after the last step; these runs are done")
    return [run.folder.summary() for run in runs]


class Job:
    """A run about to be trained, in a folder that is locked: its files are made, and its record is begun."""

    def __init__(
        self, run: PlannedRun, overrides: list[str], judge: Callable[[int, float], str | None] | None = None,
        trial: dict[str, Any] | None = None, place: int = 0,
    ) -> None:  # fmt: skip
        """``place``: among the runs that train together."""
        self.run, self.judge = run, judge
        cfg, folder = run.cfg, run.folder
        (folder.path / "summary.json").unlink(missing_ok=True)
        folder.create(cfg, run.corpus)
        self.about = describe_run(cfg, run.corpus, run.run_id, run.variant, overrides)
        if trial is not None:
            self.about["trial"] = trial
        display = replace(cfg.display, run_index=cfg.display.run_index + place)
        name = f"{run.variant} seed {cfg.seed_init}"
        self.progress = RunProgress(name, cfg.trainer.max_steps, display, folder.note)
        if place and self.progress.style == "bar":
            self.progress.style = "off"  # a terminal has room for one
        folder.note(parameter_table(cfg))
        if run.corpus.unknown_in_val:
            self.progress.message(f"{run.corpus.unknown_in_val} validation characters are not in the training text")

    def finish(self, outcome: dict[str, Any]) -> None:
        folder = self.run.folder
        if outcome["status"] != "completed":
            self.progress.message(f"{outcome['status']}: {outcome['stop_reason']} (log: {folder.log})")
        folder.write_summary(self.about | outcome)
        if outcome["status"] in ENDED:  # only now: until the summary stands, a restart goes on from the checkpoint
            folder.remove_steps()


def attempt(jobs: list[Job]) -> tuple[list[dict[str, Any]], bool]:
    """The outcomes of training the jobs together, ``failed`` for an error, and whether Ctrl-C came at its end."""
    try:
        return train(jobs)
    except OSError as error:  # a full or missing disk says nothing about the runs: they stay unfinished
        for job in jobs:
            job.progress.message(f"unfinished: {error}")
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {said[0]}"
        for job in jobs:
            job.run.folder.note(traceback.format_exc())
        return [dict.fromkeys(OUTCOME) | {"status": "failed", "stop_reason": reason} for _ in jobs], False


def probe(run: PlannedRun, steps: int = 3) -> float:
    """Seconds that the run would take, from a few of its training steps and one validation batch. Writes nothing."""
    import_training(run.cfg.trainer.device)
    from hybrid.training.loop import Trainer
    from hybrid.training.member import Member

    silent = RunProgress(run.variant, run.cfg.trainer.max_steps, DisplayConfig(progress="off"), lambda _: None)
    return Trainer(Member(run.cfg, run.corpus, run.folder, silent)).estimate(steps)


def train(jobs: list[Job]) -> tuple[list[dict[str, Any]], bool]:
    """The outcomes of training from the newest checkpoints that can be read, and whether Ctrl-C came at the end."""
    import_training(jobs[0].run.cfg.trainer.device)
    from hybrid.training.checkpoint import DamagedCheckpoint
    from hybrid.training.loop import Trainer
    from hybrid.training.member import Member

    while True:
        runs = [job.run for job in jobs]
        members = [
            Member(r.cfg, r.corpus, r.folder, job.progress, job.judge) for r, job in zip(runs, jobs, strict=True)
        ]
        trainer = Trainer(*members)
        slow = slow_kernels(jobs[0].run.cfg)
        for job in jobs:
            job.run.folder.note(f"kernels: {trainer.environment['kernels']}, device: {trainer.environment['device']}")
            if slow:
                job.progress.message(slow)
        try:
            return trainer.train(), trainer.asked_to_stop
        except DamagedCheckpoint as error:
            for job in jobs:
                job.progress.message(str(error))


def slow_kernels(cfg: Config) -> str | None:
    """What to tell whoever trains on a GPU without the kernels for it."""
    used = {op for part, op in (("rwkv", "wkv6"), ("mamba", "ssd")) if part in used_parts(cfg.model)}
    plain = [f"kernels.{op}=torch" for op in sorted(used) if getattr(cfg.kernels, op) == "torch"]
    if cfg.trainer.device == "cpu" or not plain:
        return None
    return f"slow: plain PyTorch computes the recurrence on the GPU ({' and '.join(plain)})"


def parameter_table(cfg: Config) -> str:
    """Parameters by part, a line each."""
    counts = count_params(cfg)
    rows = [f"{part:<10}{counts[part]:>12,}  {counts[part] / counts['total']:>6.1%}" for part in PARTS if counts[part]]
    return "parameters\n" + "\n".join(rows)
