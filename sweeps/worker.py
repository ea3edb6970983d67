"""A job of a search: runs trials of one study, one after another in its process, until none is left.

Being the job itself that asks, reports and tells, a search works the same under every launcher, and any number of
jobs, started together or by hand, share a study.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.pruners import NopPruner, PatientPruner
from optuna.trial import Trial, TrialState

from hybrid.arguments import plain_key
from hybrid.config import ConfigError, resolve
from hybrid.data import Corpus
from hybrid.records import RunBusy, code_version
from hybrid.run import PlannedRun, check_data, execute, fit_to_corpus, plan
from hybrid.schema import Config
from sweeps.outcome import write_search_file
from sweeps.space import Space
from sweeps.stopping import Noticed
from sweeps.storage import storage_errors
from sweeps.study import Study, Worker

PRUNED = "pruned"


def work(composed: DictConfig) -> None:
    """Hydra's task function of a search."""
    cfg = resolve(composed)
    hydra = HydraConfig.get()
    root = Path(cfg.out).expanduser() / str(cfg.sweep.name)
    study = Study(cfg.sweep.search, str(cfg.sweep.search.study_name), root)
    compose = composer(hydra, study.space)
    corpus = check_data(cfg)
    with Worker(root) as worker, Noticed() as interrupt:
        while (trial := study.claim(worker)) is not None:
            with study.holding(trial):
                run_trial(study, trial, cfg, corpus, compose)
            write_search_file(study, cfg)
            if interrupt.asked:
                raise KeyboardInterrupt


def loader_of(hydra: HydraConf) -> ConfigLoaderImpl:
    """A loader of configurations from the folders that Hydra was started with."""
    path = ConfigSearchPathImpl()
    for source in hydra.runtime.config_sources:
        path.append(source.provider, f"{source.schema}://{source.path}")
    return ConfigLoaderImpl(path)


def composer(hydra: HydraConf, space: Space) -> Callable[[list[str]], Config]:
    """How this job was composed, for the parameters of a trial in place of its own."""
    loader = loader_of(hydra)
    own = [*OmegaConf.to_container(hydra.overrides.hydra), *without(space, hydra.overrides.task)]

    def compose(more: list[str]) -> Config:
        return resolve(loader.load_configuration(hydra.job.config_name, [*own, *more], run_mode=RunMode.RUN))

    return compose


def without(space: Space, lines: ListConfig) -> list[str]:
    """The overrides of this job but those of keys that are searched."""
    searched = {dimension.key for dimension in space.dimensions}
    return [line for line in OmegaConf.to_container(lines, resolve=False) if plain_key(line) not in searched]


def run_trial(study: Study, trial: Trial, arm: Config, corpus: Corpus, compose: Callable[[list[str]], Config]) -> None:
    """Draw the trial's parameters, train or find the run, and tell the study what became of it.

    Raises ``StudyError`` or another ``OSError`` where the disk or the database fails, which says nothing about the
    trial: it stays running and is taken over by the next worker.
    """
    with storage_errors(study.where):
        study.space.suggest(trial)
        lines = study.space.overrides(trial.params)  # also what an earlier call drew that searched more
    variant = f"{arm.variant}-trial-{trial.number:03d}" if arm.variant else f"trial-{trial.number:03d}"
    display = [f"display.run_index={trial.number + 1}", f"display.run_total={study.search.n_trials}"]
    try:
        cfg = compose([*lines, *display])
        fit_to_corpus(cfg, corpus)
        run = plan(cfg, corpus, variant)
    except ConfigError as error:
        with storage_errors(study.where):
            study.fail(trial, str(error))
        return
    with storage_errors(study.where):
        for key, value in (("folder", run.folder.path.name), ("run_id", run.run_id), ("code", code_version())):
            trial.set_user_attr(key, value)
    overrides = [*arm_overrides(study.space), *lines]
    summary = wait_and_execute(run, overrides, judge_of(study, trial), {"study": study.name, "number": trial.number})
    with storage_errors(study.where):
        tell(study, trial, run, summary)


def arm_overrides(space: Space) -> list[str]:
    """The overrides of this job that say something of its runs."""
    given = without(space, HydraConfig.get().overrides.task)
    about = ("variant", "sweep", "display", "sampler", "pruner")
    return [line for line in given if plain_key(line).split(".")[0] not in about]


def judge_of(study: Study, trial: Trial) -> Callable[[int, float], str | None]:
    """Reports an evaluation to the study and asks its pruner; known baselines go on whatever it says."""
    known = trial.user_attrs.get("enqueued", False)
    report = reporter(study, trial)

    def judge(step: int, loss: float) -> str | None:
        if len(study.metrics) > 1:
            return None  # Optuna takes no intermediate values of several objectives
        with storage_errors(study.where):
            report(step, loss)
            # Asked of known ones as well: halving compares a trial with those of its bracket that were asked about.
            worse = not isinstance(study.pruner, NopPruner) and trial.should_prune()
            return PRUNED if worse and not known else None

    return judge


def reporter(study: Study, trial: Trial) -> Callable[[int, float], None]:
    """Reports the loss of a step that was not reported before, in the terms of the metric.

    Of the best validation loss that is the best so far: a trial past its best is worth no less to the search. A patient
    pruner, which waits for a loss to fall, gets the losses themselves.
    """
    reported = dict(trial.storage.get_trial(trial._trial_id).intermediate_values)
    lowest = study.metrics == ["best_val_loss"] and not isinstance(study.pruner, PatientPruner)

    def report(step: int, loss: float) -> None:
        if step not in reported:
            reported[step] = min([loss, *(value for at, value in reported.items() if lowest and at < step)])
            trial.report(reported[step], step)

    return report


def wait_and_execute(
    run: PlannedRun, overrides: list[str], judge: Callable[[int, float], str | None], trial: dict[str, Any]
) -> dict[str, Any]:
    """The record of the run; where another process is at the same one, its record once it is there."""
    while True:
        with contextlib.suppress(RunBusy):
            return execute(run, overrides, judge, trial)
        time.sleep(1)


def tell(study: Study, trial: Trial, run: PlannedRun, summary: dict[str, Any]) -> None:
    """End the trial with what the record says."""
    trial.set_user_attr("steps", summary["steps"])
    trial.set_user_attr("max_steps", run.cfg.trainer.max_steps)
    trial.set_user_attr("seconds", summary["wall_seconds"])
    status, reason = summary["status"], summary["stop_reason"]
    if status in ("diverged", "failed"):
        study.fail(trial, f"{status}: {reason}", again=status == "failed")
        return
    if len(study.metrics) == 1:  # all that the run evaluated, also where an earlier trial or call trained it
        report = reporter(study, trial)
        for row in run.folder.rows():
            if row.get("kind") == "eval" and row["step"] > 0 and row["val_loss"] is not None:
                report(row["step"], row["val_loss"])
    if (status, reason) == ("stopped", PRUNED):
        study.optuna.tell(trial, state=TrialState.PRUNED)
        return
    values = [summary.get(metric) for metric in study.metrics]
    missing = [m for m, v in zip(study.metrics, values, strict=True) if v is None or not math.isfinite(v)]
    if missing:
        study.fail(trial, f"{missing[0]} is not a finite number")
    else:
        study.optuna.tell(trial, values)
