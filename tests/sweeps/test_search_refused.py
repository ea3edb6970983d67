"""Searches that cannot be, each answered by a line."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.processes import holder, metrics_steps
from tests.runs import Setting, cli, finish, start, wait_for
from tests.sweeps.searches import LR, SEARCH, trials_of, without_lr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sweep.search.n_trials=0", LR], "sweep.search.n_trials must be at least 1, got 0"),
        (["sweep.search.n_trials=2"], "sweep.search.space is empty"),
        (["sweep.search.n_trials=2", LR, "seed_init=0,1"], "a search trains one seed a trial"),
        (["sweep.search.n_trials=2", LR, "sweep.seeds=[0,1]"], "a search trains one seed a trial"),
        (["sweep.search.n_trials=2", "optim.lr=interval(-1,1)"], "optim.lr must be above 0, got -1"),
        (["sweep.search.n_trials=2", "optim.lrr=interval(1,2)"], "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["sweep.search.n_trials=2", LR, "sampler=tpee"], "sampler=tpee: no such choice; did you mean tpe?"),
        (["sweep.search.n_trials=2", LR, "sweep.search.sampler._target_=optuna.samplers.TPE"], "no such sampler"),
        (["sweep.search.n_trials=2", LR, "sweep.search.metric=loss"], "no metric 'loss'"),
        (["sweep.search.n_trials=2", LR, "sweep.search.workers=0"], "sweep.search.workers must be at least 1"),
        (["sweep.search.n_trials=2", LR, "sweep.search.enqueue=[5]"], "sweep.search.enqueue must be a list"),
        (["sweep.search.n_trials=1", LR, "sweep.search.enqueue=[{optim.lr: 0.01},{optim.lr: 0.02}]"], "is below the 2"),
        (["sweep.search.n_trials=1", LR, "sweep.search.sampler.sed=1"], "unexpected keyword argument 'sed'"),
        (["sweep.search.n_trials=1", LR, "hydra/launcher=jobli"], "did you mean joblib? (there are joblib, ray"),
        (
            ["sweep.search.n_trials=1", LR, "hydra/launcher=joblib", "hydra.launcher.jobs=2"],
            "'hydra.launcher.jobs' (conf",
        ),
        (["sweep.search.n_trials=2", LR, "sweep.search.storage=x.db"], "is no database URL"),
    ],
)
def test_what_cannot_be_searched_is_one_line(small: Setting, lines: list[str], message: str) -> None:
    answer = cli(without_lr(small, *lines), "-m")
    assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1
    assert not list(small.out.glob("*/*/summary.json"))


def test_a_search_needs_a_multirun(small: Setting) -> None:
    answer = cli(small.with_("sweep=lr_ratio_search", "data=text"))
    assert answer.code == 2 and "add -m" in answer.err


def test_a_damaged_journal_ends_the_search_in_a_line(small: Setting) -> None:
    (small.out / "s").mkdir(parents=True)
    (small.out / "s" / "study.journal").write_text("not\na\njournal\n")
    answer = cli(without_lr(small, *SEARCH, "sweep.search.n_trials=2"), "-m")
    assert answer.code == 2 and "study.journal is damaged" in answer.err and answer.err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_process_of_a_search_is_replaced_at_once(small: Setting) -> None:
    """Two workers under joblib; the process of one is killed. Its successor goes on from the checkpoint."""
    own = [line for line in small.with_() if not re.match(r"trainer\.(max_steps|eval_every|checkpoint_every)", line)]
    own += ["trainer.max_steps=300", "trainer.eval_every=100", "trainer.checkpoint_every=20"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    lines = ["sweep.name=s", "optim.lr=interval(1e-4,1e-2)", "pruner=none", "sweep.search.n_trials=3", *joblib]
    process, root = start([line for line in [*own, *lines] if not line.startswith("optim.lr=0")], "-m"), small.out / "s"
    wait_for(lambda: any(last > 60 for last in metrics_steps(root).values()), process)
    victim = next(name for name, last in metrics_steps(root).items() if last > 60)
    pid = holder(process, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    answer = finish(process)
    assert answer.code == 0 and "s: 3 complete of 3 trials" in answer.out
    assert "resumes after step" in (root / victim / "log.txt").read_text()
    assert len({trial["folder"] for trial in trials_of(root)}) == 3 == len(list(root.glob("*/summary.json")))
    assert not list((root / "workers").iterdir()) and not (root / "launcher").exists()
