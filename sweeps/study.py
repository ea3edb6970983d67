"""One Optuna study that any number of workers share: who runs which trial, and what becomes of trials left behind.

Optuna's own ``optimize`` knows neither a number of trials that holds over all workers nor, with ask and tell, what to
do with the trials of a worker that died. Here a lock in the sweep's folder makes "is there a trial left?" and "take
it" one step, and each worker holds a lock file for as long as it lives: a running trial whose worker's lock is free
is taken over, with the same number and parameters, so that its run goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import NopPruner
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from hybrid.config import ConfigError
from hybrid.records import code_version
from hybrid.schema import SearchConfig
from sweeps.sampling import build, objectives
from sweeps.setting import difference
from sweeps.space import Space
from sweeps.storage import held, open_storage, preview_storage, storage_errors

ATTEMPTS = 3  # how often a trial may die with its process without having come further
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

optuna.logging.set_verbosity(optuna.logging.WARNING)


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


def whereabouts(folder: Path, name: str | None, shared: bool) -> str:
    """What became of the worker of that name: ``here``; ``left``, as one that is told to stop; or ``killed``.

    Its lock file in ``folder`` is held, not there, or free. Where workers do not have that folder in common (not
    ``shared``), one on another machine is taken as alive until the study says that it has left.
    """
    if name is None:
        return "left"
    try:
        with (folder / f"{name}.lock").open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "killed"
    except BlockingIOError:
        return "here"
    except FileNotFoundError:
        return "left" if shared or name.startswith(f"{socket.gethostname()}-") else "here"


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
    def ended(self) -> int:
        return self.complete + self.pruned + self.failed

    @property
    def left(self) -> int:
        return max(0, self.n_trials - self.ended)


class Study:
    """A study by its name, in the journal of the sweep's folder or in a database."""

    def __init__(
        self,
        search: SearchConfig,
        name: str,
        root: Path,
        create: bool = False,
        preview: bool = False,
        setting: dict[str, Any] | None = None,
    ) -> None:
        """Open the study, or with ``create`` make it where it is not there; a ``preview`` writes nothing.

        ``setting`` is what all its trials have in common, by key. Raises ``ConfigError`` where the description cannot
        be a study or is not that of the study found, and ``StudyError`` where the storage cannot be used.
        """
        self.search, self.name, self.root, self.preview = search, name, root, preview
        self.notes: list[str] = []  # what a person has to know of the study as it was found
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
            self.space = Space(search.space)
            if create or preview:
                with self.lock():
                    self._create(setting)
            else:
                self.optuna = optuna.load_study(study_name=name, storage=self.storage, pruner=self.pruner)

    @property
    def where(self) -> str:
        """The storage in words that hide a password."""
        if self.search.storage is None:
            return str(self.root / "study.journal")
        scheme, _, rest = self.search.storage.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.preview else held(self.root / "study.lock")

    def _create(self, setting: dict[str, Any] | None) -> None:
        if self.preview and not isinstance(self.storage, InMemoryStorage):
            study = optuna.load_study(study_name=self.name, storage=self.storage, pruner=self.pruner)
        else:
            study = optuna.create_study(
                study_name=self.name, storage=self.storage, directions=self.directions, pruner=self.pruner,
                load_if_exists=True,
            )  # fmt: skip
        metrics = study.user_attrs.get("metrics")
        found = [direction.name.lower() for direction in study.directions]
        other = "; choose another sweep.name (or sweep.search.study_name)"
        if found != self.directions or (metrics is not None and metrics != self.metrics):
            raise ConfigError(f"study {self.name} in {self.where} is about {found} of {metrics}{other}")
        space = study.user_attrs.get("space") or {}
        for key, old in space.items():
            new = self.space.describe().get(key)
            if new is not None and (new["type"], new.get("choices")) != (old["type"], old.get("choices")):
                raise ConfigError(f"sweep.search.space.{key} is {new}, in study {self.name} it is {old}{other}")
        before = study.user_attrs.get("setting")
        if setting is not None and before is not None and study.get_trials(deepcopy=False):
            key = difference(before, setting, {*space, *self.space.describe()})
            if key is not None:
                raise ConfigError(f"{key} is {setting.get(key)}, in study {self.name} it is {before.get(key)}{other}")
        for params in self.search.enqueue:
            self.space.check_params(params, "sweep.search.enqueue")
        self.optuna = study
        self._compare(space)
        if self.preview:
            return
        study.set_user_attr("metrics", self.metrics)
        if setting is not None:
            study.set_user_attr("setting", setting)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(self.metrics)  # for optuna-dashboard
        study.set_user_attr("space", self.space.describe())
        for params in self.search.enqueue:
            known = self.space.check_params(params, "sweep.search.enqueue")
            study.enqueue_trial(known, {"enqueued": True}, skip_if_exists=True)

    def _compare(self, space: dict[str, Any]) -> None:
        """Note what makes the trials that are there unlike those to come."""
        ended = [trial for trial in self.trials() if trial.state in ENDED]
        if not ended:
            return
        other = sum(trial.user_attrs.get("code", code_version()) != code_version() for trial in ended)
        if other:
            self.notes.append(
                f"{other} of the {len(ended)} trials of study {self.name} were trained by another version of the code, "
                "their losses may not compare; another sweep.name begins a new search"
            )
        if space and space != self.space.describe():
            keys = [
                key for key in {**space, **self.space.describe()} if space.get(key) != self.space.describe().get(key)
            ]
            self.notes.append(
                f"the space has changed ({', '.join(keys)}); the {len(ended)} trials of study {self.name} before stay "
                "and count"
            )

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
            for trial in self.trials():
                mine = trial.user_attrs.get("worker") == worker.name
                if trial.state == TrialState.RUNNING and not mine and self._take_over(trial):
                    self._note(trial, worker=worker.name)
                    return Trial(self._sampling(trial.number), trial._trial_id)
            taken = sum(trial.state != TrialState.WAITING for trial in self.trials())
            if taken >= (self.search.n_trials or 0):
                return None
            trial = self._sampling(len(self.optuna.get_trials(deepcopy=False))).ask()
            trial.set_user_attr("worker", worker.name)
            return trial

    def _take_over(self, trial: FrozenTrial) -> bool:
        """Whether a running trial is to be gone on with; one that cannot be ends, in its place waits a new one."""
        facts, folder = trial.user_attrs, self.root / "workers"
        found = whereabouts(folder, facts.get("worker"), shared=self.search.storage is None)
        if found == "here":
            return False
        if facts.get("code", code_version()) != code_version():  # its curve would be of two codes
            self._note(trial, reason="unfinished, and the code has changed since")
            self.optuna.tell(trial.number, state=TrialState.FAIL)
            self._queue(trial)
            return False
        if found == "left":
            return True
        evaluated = len(trial.intermediate_values)
        deaths = 1 if evaluated > facts.get("evaluated", 0) else facts.get("deaths", 0) + 1
        self._note(trial, deaths=deaths, evaluated=evaluated, worker=None)
        (folder / f"{facts['worker']}.lock").unlink(missing_ok=True)
        if deaths < ATTEMPTS:
            return True
        self._note(trial, reason=f"its process died {ATTEMPTS} times (killed, or out of memory?)", again=True)
        self.optuna.tell(trial.number, state=TrialState.FAIL)
        return False

    @contextlib.contextmanager
    def holding(self, trial: Trial) -> Iterator[None]:
        """Whatever ends a worker but a kill leaves the trial to the next one, also on a machine without this folder."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the storage may be what failed, or the trial has ended
                trial.set_user_attr("worker", None)
            raise

    def elsewhere(self) -> int:
        """How many trials are being run right now."""
        with self.lock():
            owners = [t.user_attrs.get("worker") for t in self.trials() if t.state == TrialState.RUNNING]
            shared = self.search.storage is None
            return sum(whereabouts(self.root / "workers", owner, shared) == "here" for owner in owners)

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
                self._queue(trial)
            return len(failed)

    def _queue(self, trial: FrozenTrial) -> None:
        """Let a new trial with the same parameters take the place of one that has ended."""
        told = {"enqueued": trial.user_attrs.get("enqueued", False), "instead_of": trial.number}
        self.optuna.enqueue_trial(trial.params, told)
