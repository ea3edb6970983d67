"""One Optuna study that any number of workers share: who runs which trial, and what becomes of trials left behind.

Optuna's own ``optimize`` knows neither a number of trials that holds over all workers nor, with ask and tell, what to
do with the trials of a worker that died. Here a lock in the sweep's folder makes "is there a trial left?" and "take
it" one step, and each worker holds a lock file for as long as it lives: a running trial whose worker's lock is free
is taken over, with the same number and parameters, so that its run goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from hydra.errors import HydraException
from hydra.utils import instantiate
from optuna.exceptions import OptunaError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, QMCSampler
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hybrid.config import ConfigError
from hybrid.schema import SearchConfig
from sweeps.space import Space

PATIENCE = 60.0  # seconds that a lock, held for milliseconds, may be held by others before that is an error
ATTEMPTS = 3  # how often a trial may die with its process
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudyError(OSError):
    """The study's storage cannot be used; the message is one line. What was recorded stays as it is."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[IO[str]]:
    """Hold a lock file; it is free again when the process dies, however that happens. Raises ``StudyError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StudyError(f"{path} has been held by another process for {PATIENCE:.0f} s") from error
                time.sleep(0.01)
        yield handle


class JournalLock(BaseJournalFileLock):
    """Excludes other writers of a journal file, and mends what a writer that was killed left half written.

    Optuna's own locks are files that stay when their owner is killed, and its journal cannot be read any more once a
    line follows a torn one.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.open = contextlib.ExitStack()

    def acquire(self) -> bool:
        self.open.enter_context(held(self.journal.with_suffix(".journal-lock")))
        with self.journal.open("rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            journal.seek(max(0, size - 1))
            if journal.read() not in (b"", b"\n"):
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.open.close()


class Worker:
    """This process as one that runs trials. Its lock file is held for as long as it lives."""

    def __init__(self, root: Path) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = root / "workers" / f"{self.name}.lock"

    def __enter__(self) -> Worker:
        self.open = contextlib.ExitStack()
        self.open.enter_context(held(self.path))
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        self.open.close()


def is_dead(folder: Path, name: str | None, shared: bool) -> bool:
    """Whether the worker of that name has gone: its lock file in ``folder`` is free, or is not there.

    Where workers need not have the folder in common (``shared``), one on another machine is taken as alive.
    """
    if name is None:
        return True
    path = folder / f"{name}.lock"
    try:
        with path.open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return shared or name.startswith(f"{socket.gethostname()}-")


@dataclass
class Progress:
    """Numbers of trials."""

    n_trials: int
    complete: int = 0
    pruned: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0

    @property
    def left(self) -> int:
        return max(0, self.n_trials - self.complete - self.pruned - self.failed)


class Study:
    """A study by its name, in the journal of the sweep's folder or in a database."""

    def __init__(
        self, search: SearchConfig, name: str, root: Path, create: bool = False, preview: bool = False
    ) -> None:
        """Open the study, or with ``create`` make it where it is not there; a ``preview`` writes nothing.

        Raises ``ConfigError`` where the description cannot be a study or is not that of the study found, and
        ``StudyError`` where the storage cannot be used.
        """
        self.search, self.name, self.root, self.preview = search, name, root, preview
        self.metrics, self.directions = objectives(search)
        self.pruner = build(search.pruner, "pruner")
        build(search.sampler, "sampler")
        if not isinstance(self.pruner, NopPruner) and self.metrics not in (["best_val_loss"], ["final_val_loss"]):
            raise ConfigError(
                "sweep.search.pruner: pruning compares validation losses on the way, which "
                f"{' and '.join(self.metrics)} are not; add pruner=none"
            )
        with storage_errors(self.where):
            if preview:
                self.storage = preview_storage(search.storage, root, name)
            else:
                self.storage = open_storage(search.storage, root, create)
            if create or preview:
                self.space = Space(search.space)
                with self.lock():
                    self._create()
            else:
                self.optuna = optuna.load_study(study_name=name, storage=self.storage, pruner=self.pruner)
                self.space = Space(self.optuna.user_attrs["space"])

    @property
    def where(self) -> str:
        """The storage in words that hide a password."""
        if self.search.storage is None:
            return str(self.root / "study.journal")
        scheme, _, rest = self.search.storage.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.preview else held(self.root / "study.lock")

    def _create(self) -> None:
        if self.preview and not isinstance(self.storage, InMemoryStorage):
            study = optuna.load_study(study_name=self.name, storage=self.storage, pruner=self.pruner)
        else:
            study = optuna.create_study(
                study_name=self.name, storage=self.storage, directions=self.directions, pruner=self.pruner,
                load_if_exists=True,
            )  # fmt: skip
        metrics = study.user_attrs.get("metrics")
        found = [direction.name.lower() for direction in study.directions]
        other = "; choose another sweep.search.study_name"
        if found != self.directions or (metrics is not None and metrics != self.metrics):
            raise ConfigError(f"study {self.name} in {self.where} is about {found} of {metrics}{other}")
        for key, old in (study.user_attrs.get("space") or {}).items():
            new = self.space.describe().get(key)
            if new is not None and (new["type"], new.get("choices")) != (old["type"], old.get("choices")):
                raise ConfigError(f"sweep.search.space.{key} is {new}, in study {self.name} it is {old}{other}")
        for params in self.search.enqueue:
            self.space.check_params(params, "sweep.search.enqueue")
        self.optuna = study
        if self.preview:
            return
        study.set_user_attr("metrics", self.metrics)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(self.metrics)  # for optuna-dashboard
        study.set_user_attr("space", self.space.describe())
        for params in self.search.enqueue:
            known = self.space.check_params(params, "sweep.search.enqueue")
            study.enqueue_trial(known, {"enqueued": True}, skip_if_exists=True)

    def trials(self) -> list[FrozenTrial]:
        """All trials but those that another one replaces (``queue_failed``), by number."""
        trials = self.optuna.get_trials(deepcopy=False)
        replaced = {trial.user_attrs.get("instead_of") for trial in trials}
        return [trial for trial in trials if trial.number not in replaced]

    def progress(self) -> Progress:
        states = [trial.state for trial in self.trials()]
        return Progress(
            self.search.n_trials or 0,
            *(states.count(state) for state in (*ENDED, TrialState.RUNNING, TrialState.WAITING)),
        )

    def claim(self, worker: Worker) -> Trial | None:
        """The next trial for ``worker``: one that a dead worker left, one that waits, or a new one.

        None where ``n_trials`` have been taken.
        """
        with storage_errors(self.where), self.lock():
            trials = self.trials()
            for trial in trials:
                mine = trial.user_attrs.get("worker") == worker.name
                if trial.state == TrialState.RUNNING and not mine and self._abandoned(trial):
                    deaths = trial.user_attrs.get("deaths", 0) + 1
                    self._note(trial, deaths=deaths)
                    if deaths < ATTEMPTS:
                        self._note(trial, worker=worker.name)
                        return Trial(self._sampling(trial.number), trial._trial_id)
                    self._note(
                        trial, reason=f"its process died {ATTEMPTS} times (killed, or out of memory?)", again=True
                    )
                    self.optuna.tell(trial.number, state=TrialState.FAIL)
            taken = sum(trial.state != TrialState.WAITING for trial in trials)
            if taken >= (self.search.n_trials or 0):
                return None
            trial = self._sampling(len(self.optuna.get_trials(deepcopy=False))).ask()
            trial.set_user_attr("worker", worker.name)
            return trial

    def _abandoned(self, trial: FrozenTrial) -> bool:
        return is_dead(self.root / "workers", trial.user_attrs.get("worker"), shared=self.search.storage is None)

    def elsewhere(self) -> int:
        """How many trials are being run right now."""
        with self.lock():
            running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
            return sum(not self._abandoned(trial) for trial in running)

    def _sampling(self, number: int) -> optuna.Study:
        """The study with a sampler for trial ``number``, so that no two workers and no two calls draw the same."""
        self.optuna.sampler = build(self.search.sampler, "sampler", number)
        return self.optuna

    def _note(self, trial: FrozenTrial, **facts: Any) -> None:
        for key, value in facts.items():
            self.storage.set_trial_user_attr(trial._trial_id, key, value)

    def fail(self, trial: Trial, reason: str, again: bool = False) -> None:
        """End the trial without a value; ``again`` if another attempt may bring one (``retry_failed``)."""
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("again", again)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def queue_failed(self) -> int:
        """Queue the trials that failed (not the diverged ones) with the same parameters; how many there were."""
        with storage_errors(self.where), self.lock():
            failed = [t for t in self.trials() if t.state == TrialState.FAIL and t.user_attrs.get("again")]
            for trial in failed:
                told = {"enqueued": trial.user_attrs.get("enqueued", False), "instead_of": trial.number}
                self.optuna.enqueue_trial(trial.params, told)
            return len(failed)


def rehearse(search: SearchConfig, space: Space) -> None:
    """Draw a few trials without running them: not every sampler can serve every space. Raises ``ConfigError``."""
    _, directions = objectives(search)
    study = optuna.create_study(directions=directions, sampler=build(search.sampler, "sampler"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for value in range(3):
                trial = study.ask()
                space.suggest(trial)
                study.tell(trial, [float(value)] * len(directions))
    except ModuleNotFoundError as error:
        raise ConfigError(f"sweep.search.sampler needs the package {error.name}: pip install {error.name}") from error
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"sweep.search.sampler: {' '.join(str(error).split())}") from error


def objectives(search: SearchConfig) -> tuple[list[str], list[str]]:
    """Metrics and directions as lists. Raises ``ConfigError``."""
    metrics = list(search.metric) if isinstance(search.metric, list) else [search.metric]
    directions = list(search.direction) if isinstance(search.direction, list) else [search.direction]
    known = ("best_val_loss", "final_val_loss", "final_train_loss", "val_bits_per_byte", "tokens_per_second",
             "peak_memory_bytes", "wall_seconds", "flops_per_token")  # fmt: skip
    for metric in metrics:
        if metric not in known:
            near = difflib.get_close_matches(str(metric), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"sweep.search.metric: no metric '{metric}'{hint} (there are {', '.join(known)})")
    for direction in directions:
        if direction not in ("minimize", "maximize"):
            raise ConfigError(f"sweep.search.direction must be minimize or maximize, got {direction}")
    if len(metrics) != len(directions) or not metrics:
        raise ConfigError(f"sweep.search.direction: one for each metric is needed, got {directions} for {metrics}")
    return metrics, directions


def build(described: dict[str, Any], kind: str, number: int = 0) -> Any:
    """A sampler or pruner from its ``_target_`` and arguments. Raises ``ConfigError``.

    A sampler's seed is moved on by the trial's ``number``; only the points of a quasi-Monte Carlo sequence belong
    together and keep one.
    """
    where, base = f"sweep.search.{kind}", BaseSampler if kind == "sampler" else BasePruner
    target = described.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(
            f"{where}._target_ is not set (e.g. optuna.{kind}s.{'TPESampler' if kind == 'sampler' else 'MedianPruner'})"
        )
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        own = [
            found
            for found in dir(getattr(optuna, f"{kind}s"))
            if found.endswith(kind.title()) and found != base.__name__
        ]
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"; did you mean optuna.{kind}s.{near[0]}?" if near else ""
        raise ConfigError(f"{where}._target_={target}: no such {kind}{hint}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{where}._target_={target} is no {kind}")
    arguments = dict(described)
    if arguments.get("seed") is not None and not issubclass(cls, QMCSampler):
        arguments["seed"] = (int(arguments["seed"]) * 1_000_003 + number) % 2**32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return instantiate(arguments)
    except (HydraException, TypeError, ValueError, ImportError) as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{where}: {type(cause).__name__}: {cause}") from error


def open_storage(url: str | None, root: Path, create: bool) -> BaseStorage:
    if url is not None:
        if "://" not in url:
            raise ConfigError(f"sweep.search.storage={url} is no database URL, e.g. sqlite:///searches.db")
        return RDBStorage(
            url, engine_kwargs={"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else None
        )
    journal = root / "study.journal"
    if create:
        root.mkdir(parents=True, exist_ok=True)
        journal.touch()
    return JournalStorage(JournalFileBackend(str(journal), JournalLock(journal)))


def preview_storage(url: str | None, root: Path, name: str) -> BaseStorage:
    """The storage if it holds the study, else one in memory."""
    if url is None and not (root / "study.journal").exists():
        return InMemoryStorage()
    if url is not None and url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return InMemoryStorage()
    storage = open_storage(url, root, create=False)
    return storage if name in optuna.get_all_study_names(storage) else InMemoryStorage()


@contextlib.contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """What a storage raises as a ``StudyError`` of one line."""
    try:
        yield
    except (ConfigError, StudyError):
        raise
    except PermissionError as error:
        raise StudyError(f"{where}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AssertionError) as error:
        raise StudyError(
            f"{where} is damaged ({type(error).__name__}: {str(error).partition(chr(10))[0]}); restore it, or move it "
            "away to begin a new study: runs that are done are found again"
        ) from error
    except (OptunaError, SQLAlchemyError, ImportError, ValueError) as error:
        raise StudyError(f"{where}: {' '.join(str(error).split())}") from error
