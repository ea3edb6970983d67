"""A study shared by workers: how many trials there are, who has them, what becomes of those left behind."""

from __future__ import annotations

import fcntl
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

import sweeps.storage
import sweeps.study
from hybrid.config import CONF_DIR, ConfigError, group_options
from hybrid.schema import SearchConfig
from sweeps.sampling import build, rehearse
from sweeps.space import Space
from sweeps.storage import StudyError
from sweeps.study import ATTEMPTS, Study, Worker
from tests.runs import ROOT

LR = {"optim.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
RANDOM = {"_target_": "optuna.samplers.RandomSampler", "seed": 3}
NONE = {"_target_": "optuna.pruners.NopPruner"}


def search(n_trials: int = 4, **changes: object) -> SearchConfig:
    return SearchConfig(**{"n_trials": n_trials, "space": LR, "sampler": RANDOM, "pruner": NONE} | changes)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Study]:
    """A study named s in this test's folder, made or found."""

    def make(n_trials: int = 4, create: bool = True, name: str = "s", **changes: object) -> Study:
        return Study(search(n_trials, **changes), name, tmp_path, create=create)

    return make


def run_all(study: Study, loss: Callable[[float], float] = lambda lr: (math.log10(lr) + 3) ** 2) -> list[float]:
    """Every trial that is left, with a loss that a formula gives; the learning rates drawn."""
    drawn = []
    with Worker(study.root) as worker:
        while (trial := study.claim(worker)) is not None:
            drawn.append(study.space.suggest(trial)["optim.lr"])
            study.optuna.tell(trial, loss(drawn[-1]))
    return drawn


def die(worker: Worker) -> None:
    """As kill -9 leaves it: the lock file is there and nobody holds it."""
    worker.open.close()


# ---- how many


def test_the_number_of_trials_holds_over_calls(make: Callable[..., Study]) -> None:
    assert len(run_all(make(3))) == 3
    assert run_all(make(3, create=False)) == []
    assert len(run_all(make(5))) == 2
    assert [trial.number for trial in make(5).trials()] == [0, 1, 2, 3, 4]


def test_the_number_of_trials_holds_over_workers_at_once(make: Callable[..., Study]) -> None:
    make(30)
    program = (
        "import sys; from pathlib import Path; from tests.sweeps.test_study import *;"
        "print(len(run_all(Study(search(30), 's', Path(sys.argv[1])))))"
    )
    study = make(30)
    workers = [
        subprocess.Popen([sys.executable, "-c", program, str(study.root)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    counts = [int(worker.communicate(timeout=100)[0]) for worker in workers]
    trials = study.trials()
    assert sum(counts) == 30 and [trial.number for trial in trials] == list(range(30))
    assert len({trial.params["optim.lr"] for trial in trials}) == 30  # no two drew the same
    assert not list((study.root / "workers").iterdir())


def test_a_resumed_study_draws_what_an_undisturbed_one_draws(make: Callable[..., Study]) -> None:
    tpe = {"_target_": "optuna.samplers.TPESampler", "seed": 0, "n_startup_trials": 3}
    whole = run_all(make(8, sampler=tpe))
    parts = [lr for n in (1, 2, 5, 8) for lr in run_all(make(n, sampler=tpe, name="other"))]
    assert parts == whole and len(set(whole)) == 8


def test_a_failed_trial_counts_and_can_be_tried_again(make: Callable[..., Study]) -> None:
    study = make(2)
    with Worker(study.root) as worker:
        for again in (True, False):
            trial = study.claim(worker)
            params = study.space.suggest(trial)
            study.fail(trial, "no luck", again=again)
            if again:
                first = params
        assert study.claim(worker) is None and study.progress().failed == 2
        assert study.queue_failed() == 1 and study.queue_failed() == 0
        trial = study.claim(worker)
        assert study.space.suggest(trial) == first
        study.optuna.tell(trial, 1.0)
        assert study.claim(worker) is None
    progress = study.progress()
    assert (progress.complete, progress.failed, progress.left) == (1, 1, 0)


def test_known_baselines_come_first_and_once(make: Callable[..., Study]) -> None:
    known = [{"optim.lr": 1e-3}, {"optim.lr": 3e-3}]
    make(3, enqueue=known)
    study = make(3, enqueue=known)
    drawn = run_all(study)
    assert drawn[:2] == [1e-3, 3e-3] and len(drawn) == 3
    assert [trial.user_attrs.get("enqueued", False) for trial in study.trials()] == [True, True, False]


# ---- workers that die


def test_the_trial_of_a_dead_worker_is_taken_over(make: Callable[..., Study]) -> None:
    study = make(2)
    dead = Worker(study.root)
    dead.__enter__()
    trial = study.claim(dead)
    params = study.space.suggest(trial)
    trial.report(2.0, 5)
    with Worker(study.root) as alive:
        other = study.claim(alive)
        assert other.number == 1  # the first one's worker lives
        study.space.suggest(other)
        study.optuna.tell(other, 1.0)
        assert study.claim(alive) is None and study.elsewhere() == 1
        die(dead)
        assert study.elsewhere() == 0
        taken = study.claim(alive)
        assert taken.number == 0 and study.space.suggest(taken) == params
        assert study.trials()[0].intermediate_values == {5: 2.0}
        study.optuna.tell(taken, 1.5)
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 2


def test_a_trial_that_kills_its_process_again_and_again_fails(make: Callable[..., Study]) -> None:
    study = make(1)
    for _ in range(ATTEMPTS):
        worker = Worker(study.root)
        worker.__enter__()
        assert study.claim(worker).number == 0
        die(worker)
    with Worker(study.root) as worker:
        assert study.claim(worker) is None
    (trial,) = study.trials()
    assert trial.state == TrialState.FAIL and f"died {ATTEMPTS} times" in trial.user_attrs["reason"]


def test_a_trial_that_comes_further_each_time_may_die_more_often(make: Callable[..., Study]) -> None:
    """Machines that are switched off every night: the run goes on from its checkpoints."""
    study = make(1)
    for step in range(ATTEMPTS + 2):
        worker = Worker(study.root)
        worker.__enter__()
        trial = study.claim(worker)
        assert trial is not None and trial.number == 0
        trial.report(2.0, step)
        die(worker)
    for _ in range(ATTEMPTS - 1):  # the first of these deaths is that of a trial that had come further
        worker = Worker(study.root)
        worker.__enter__()
        assert study.claim(worker) is not None
        die(worker)
    with Worker(study.root) as worker:
        assert study.claim(worker) is None
    assert study.progress().failed == 1 and not list((study.root / "workers").iterdir())


def test_a_worker_that_is_told_to_stop_leaves_its_trial_without_a_death(make: Callable[..., Study]) -> None:
    study = make(1)
    for _ in range(ATTEMPTS + 2):
        with pytest.raises(KeyboardInterrupt), Worker(study.root) as worker:
            trial = study.claim(worker)
            with study.holding(trial):
                raise KeyboardInterrupt
        assert study.trials()[0].user_attrs["worker"] is None
    assert run_all(study) and study.progress().complete == 1


def test_a_worker_that_left_another_machine_leaves_its_trial(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make(1, storage=f"sqlite:///{tmp_path}/s.db")
    elsewhere = Worker(tmp_path / "another folder")
    elsewhere.name = "other-host-1-abcd"
    with pytest.raises(RuntimeError), elsewhere, study.holding(study.claim(elsewhere)):
        raise RuntimeError
    assert len(run_all(study)) == 1


# ---- what has changed since


def test_trials_of_another_version_of_the_code_are_named(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(3)
    with Worker(study.root) as worker:
        for code in ("old", sweeps.study.code_version()):
            trial = study.claim(worker)
            study.space.suggest(trial)
            trial.set_user_attr("code", code)
            study.optuna.tell(trial, 1.0)
    (note,) = make(3).notes
    assert note.startswith("1 of the 2 trials of study s were trained by another version of the code")
    monkeypatch.setattr(sweeps.study, "code_version", lambda: "old")
    assert make(3).notes[0].startswith("1 of the 2 trials")


def test_a_trial_begun_by_another_version_of_the_code_is_begun_anew(make: Callable[..., Study]) -> None:
    """With the same parameters, as the same of ``n_trials``; its half curve is of another code."""
    study = make(2)
    with pytest.raises(RuntimeError), Worker(study.root) as worker:
        trial = study.claim(worker)
        params = study.space.suggest(trial)
        trial.report(2.0, 5)
        trial.set_user_attr("code", "old")
        with study.holding(trial):
            raise RuntimeError
    drawn = run_all(study)
    assert drawn[0] == params["optim.lr"] and len(drawn) == 2
    assert [(trial.number, trial.state) for trial in study.trials()] == [
        (1, TrialState.COMPLETE),
        (2, TrialState.COMPLETE),
    ]
    assert study.trials()[0].intermediate_values == {} and study.progress().left == 0


def test_a_study_is_not_gone_on_with_under_another_setting(make: Callable[..., Study], tmp_path: Path) -> None:
    def found(setting: dict[str, object], **changes: object) -> Study:
        return Study(search(2, **changes), "s", tmp_path, create=True, setting=setting)

    setting = {"trainer.max_steps": 10, "optim.lr": 1e-4}
    found(setting | {"trainer.max_steps": 20})  # nothing is trained yet
    run_all(found(setting))
    found(setting | {"optim.lr": 1e-3})  # which is searched
    for changed in (setting | {"trainer.max_steps": 20}, setting | {"data.works": ["hamlet"]}):
        with pytest.raises(
            ConfigError, match=r"^(trainer.max_steps is 20|data.works is .*), in study s it is (10|None)"
        ):
            found(changed)


def test_a_changed_space_is_named(make: Callable[..., Study]) -> None:
    run_all(make(2))
    assert make(2).notes == []
    (note,) = make(2, space={"optim.eps": {"type": "float", "low": 0.1, "high": 1.0}}).notes
    assert note.startswith("the space has changed (optim.lr, optim.eps); the 2 trials of study s before stay")


def test_a_worker_on_a_machine_without_this_folder_is_taken_as_alive(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    study = make(1, storage=url)
    elsewhere = Worker(tmp_path / "another folder")
    elsewhere.name = "other-host-1-abcd"
    with elsewhere, Worker(study.root) as here:
        study.claim(elsewhere)
        assert study.claim(here) is None and study.elsewhere() == 1


# ---- storage


def test_a_torn_line_does_not_spoil_the_journal(make: Callable[..., Study]) -> None:
    run_all(make(2))
    journal = make(2).root / "study.journal"
    with journal.open("a") as file:
        file.write('{"op_code": 4, "wor')  # killed in the middle
    assert len(run_all(make(4))) == 2
    assert [trial.number for trial in make(4, create=False).trials()] == [0, 1, 2, 3]
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_damaged_journal_is_named_and_left_alone(make: Callable[..., Study]) -> None:
    run_all(make(2))
    journal = make(2).root / "study.journal"
    lines = journal.read_text().splitlines()
    lines[3] = lines[3][:-5]
    journal.write_text("\n".join(lines) + "\n")
    before = journal.read_text()
    with pytest.raises(StudyError, match=r"study\.journal is damaged .*move it away") as caught:
        make(4)
    assert "\n" not in str(caught.value) and journal.read_text() == before


def test_a_lock_that_is_never_given_back(make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(2)
    monkeypatch.setattr(sweeps.storage, "PATIENCE", 0.1)
    for name in ("study.lock", "study.journal-lock"):
        with (study.root / name).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with Worker(study.root) as worker, pytest.raises(StudyError, match=f"{name} has been held by another"):
                study.claim(worker)
    assert len(run_all(study)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(make: Callable[..., Study], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="study"):
        make(2)


def test_a_database_serves_as_well(make: Callable[..., Study], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/searches.db"
    assert len(run_all(make(2, storage=url))) == 2 and len(run_all(make(3, storage=url))) == 1
    assert not (tmp_path / "study.journal").exists()
    for bad in ("searches.db", "nosuch://host/db", f"sqlite:///{tmp_path}/no/such/folder/x.db"):
        with pytest.raises((ConfigError, StudyError)) as caught:
            make(2, storage=bad)
        assert "\n" not in str(caught.value)


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    study = object.__new__(Study)
    study.search, study.root = search(storage="mysql://me:secret@host/db"), tmp_path
    assert study.where == "mysql://host/db"


def test_another_study_of_that_name_is_refused(make: Callable[..., Study]) -> None:
    make(2)
    with pytest.raises(ConfigError, match="choose another"):
        make(2, metric="final_val_loss")
    with pytest.raises(ConfigError, match="choose another"):
        make(2, direction="maximize")
    with pytest.raises(ConfigError, match=r"space\.optim\.lr is .* in study s it is"):
        make(2, space={"optim.lr": {"type": "categorical", "choices": [1e-3, 1e-2]}})
    wider = make(3, space={"optim.lr": LR["optim.lr"] | {"high": 1e-1}})  # a range may grow
    assert len(run_all(wider)) == 3


# ---- samplers and pruners


@pytest.mark.parametrize("name", group_options("sampler"))
def test_every_sampler_serves_a_study(name: str, make: Callable[..., Study]) -> None:
    sampler = yaml.safe_load((CONF_DIR / "sampler" / f"{name}.yaml").read_text())
    drawn = run_all(make(14, sampler=sampler))
    assert len(set(drawn)) == 14 and all(1e-4 <= lr <= 1e-2 for lr in drawn)


def test_points_of_a_quasi_monte_carlo_sequence_belong_together(make: Callable[..., Study]) -> None:
    """Eight scrambled Sobol points fall into eight different eighths of the range; independent ones would not."""
    sampler = yaml.safe_load((CONF_DIR / "sampler" / "qmc.yaml").read_text())
    space = {"optim.weight_decay": {"type": "float", "low": 0.0, "high": 1.0}}
    study = make(9, sampler=sampler, space=space)
    drawn = []
    for _ in range(9):  # a worker for each
        with Worker(study.root) as worker:
            trial = study.claim(worker)
            drawn.append(study.space.suggest(trial)["optim.weight_decay"])
            study.optuna.tell(trial, 0.0)
    assert len({int(8 * value) for value in drawn[1:]}) == 8  # the first is Optuna's independent one


@pytest.mark.parametrize("name", group_options("pruner"))
def test_every_pruner_can_be_built(name: str) -> None:
    pruner = yaml.safe_load((CONF_DIR / "pruner" / f"{name}.yaml").read_text())
    numbers = {"${trainer.eval_every}": 5, "${trainer.max_steps}": 20, "${schedule.warmup_steps}": 2}
    pruner = {key: numbers.get(value, value) if isinstance(value, str) else value for key, value in pruner.items()}
    assert isinstance(build(pruner, "pruner"), optuna.pruners.BasePruner)


@pytest.mark.parametrize(
    ("kind", "described", "message"),
    [
        ("sampler", {"_target_": "optuna.samplers.TPESamler"}, "did you mean optuna.samplers.TPESampler?"),
        ("sampler", {"_target_": "nosuch.module.Sampler"}, "_target_=nosuch.module.Sampler: no such sampler"),
        ("sampler", {"_target_": "optuna.pruners.MedianPruner"}, "is no sampler"),
        ("sampler", {"_target_": "optuna.samplers.TPESampler", "sed": 1}, "sed"),
        ("sampler", {"_target_": "optuna.samplers.TPESampler", "seed": "x"}, "seed must be a whole number from 0"),
        ("pruner", {"_target_": "optuna.pruners.Median"}, "did you mean optuna.pruners.MedianPruner?"),
        ("pruner", {"_target_": "optuna.pruners.WilcoxonPruner", "p_threshold": 2}, "p_threshold"),
        ("pruner", {}, "sweep.search.pruner._target_ is not set"),
    ],
)
def test_a_bad_sampler_or_pruner_is_named(kind: str, described: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(described, kind)
    assert message in str(caught.value) and f"sweep.search.{kind}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sampler_that_cannot_serve_the_space_is_found_before_the_first_run() -> None:
    two = {"metric": ["best_val_loss", "tokens_per_second"], "direction": ["minimize", "maximize"]}
    rehearse(search(**two), Space(LR))
    grid = {"_target_": "optuna.samplers.GridSampler", "search_space": {"optim.eps": [1, 2]}}
    with pytest.raises(ConfigError, match=r"sweep\.search\.sampler: .*optim\.lr"):
        rehearse(search(sampler=grid), Space(LR))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "best_val_los"}, "did you mean best_val_loss?"),
        ({"direction": "down"}, "must be minimize or maximize"),
        ({"metric": ["best_val_loss", "tokens_per_second"]}, "one for each metric"),
        ({"enqueue": [{"optim.lr": 5}]}, "outside its dimension"),
        ({"metric": "tokens_per_second", "pruner": {"_target_": "optuna.pruners.MedianPruner"}}, "add pruner=none"),
    ],
)
def test_what_cannot_be_a_study_is_refused(
    make: Callable[..., Study], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(2, **changes)
    assert message in str(caught.value)


def test_a_preview_writes_nothing(make: Callable[..., Study], tmp_path: Path) -> None:
    empty = Study(search(3), "s", tmp_path / "new", create=True, preview=True)
    assert empty.progress().left == 3 and not (tmp_path / "new").exists()
    run_all(make(2))
    before = (tmp_path / "study.journal").read_text()
    assert Study(search(3), "s", tmp_path, create=True, preview=True).progress().left == 1
    assert (tmp_path / "study.journal").read_text() == before
