"""What a search leaves behind: ``search.json`` for the analysis, ``best.yaml`` to go on with, and a table.

Both files bear the arm's name where every arm of a sweep has a study of its own.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import yaml
from optuna.exceptions import OptunaError
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrid.files import write_text_atomically
from hybrid.records import code_version
from hybrid.schema import Config
from sweeps.storage import storage_errors
from sweeps.study import Study

SCHEMA = "groundthink.search/1"
TOP = 5  # trials of the table at the end
SECTIONS = ("model", "fusion", "init", "data", "optim", "schedule", "trainer")  # what best.yaml is about
BEST_GROUPS = (*SECTIONS, "blocks", "gate_init")
MACHINE = ("device", "dtype", "cpu_threads")  # of trainer: what another machine chooses anew


def file_name(stem: str, arm: str | None, suffix: str) -> str:
    return f"{stem}-{arm}{suffix}" if arm else f"{stem}{suffix}"


def write_search_file(study: Study, arm: Config, importance: bool = False) -> Path:
    """Write what the study has found so far; with ``importance``, how much each dimension matters."""
    path = study.root / file_name("search", arm.variant, ".json")
    with storage_errors(str(path)), study.lock():
        write_text_atomically(path, json.dumps(snapshot(study, arm, importance), indent=1) + "\n")
    return path


def snapshot(study: Study, arm: Config, importance: bool) -> dict[str, Any]:
    search = study.search
    trials = [describe_trial(trial) for trial in study.trials()]
    ended = [trial for trial in trials if trial["state"] in ("COMPLETE", "PRUNED") and trial["steps"] is not None]
    return {
        "schema": SCHEMA,
        "sweep": arm.sweep.name,
        "question": arm.sweep.question,
        "arm": arm.variant,
        "study_name": study.name,
        "storage": study.where,
        "sampler": str(search.sampler["_target_"]).rpartition(".")[2],
        "pruner": str(search.pruner["_target_"]).rpartition(".")[2],
        "n_trials": search.n_trials,
        "fresh_seeds": fresh_seeds(arm),
        "metrics": study.metrics,
        "directions": study.directions,
        "space": study.space.describe(),
        "trials": trials,
        "best": [trial.number for trial in best_trials(study)],
        "importance": importances(study) if importance else {},
        "importance_method": "PED-ANOVA",
        "steps": {
            "run": sum(trial["steps"] for trial in ended),
            "without_pruning": sum(trial["max_steps"] for trial in ended),
        },
    }


def fresh_seeds(cfg: Config) -> list[int]:
    """Five seeds that had no part in a search, to confirm what it found."""
    return [seed for seed in range(7) if seed not in (cfg.seed_init, cfg.seed_data)][:5]


def describe_trial(trial: FrozenTrial) -> dict[str, Any]:
    facts = trial.user_attrs
    return {
        "number": trial.number,
        "state": trial.state.name,
        "params": trial.params,
        "values": list(trial.values) if trial.state == TrialState.COMPLETE else None,
        "intermediate": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
        "reason": facts.get("reason"),
        "folder": facts.get("folder"),
        "run_id": facts.get("run_id"),
        "code_version": facts.get("code"),
        "steps": facts.get("steps"),
        "max_steps": facts.get("max_steps"),
        "seconds": facts.get("seconds"),
        "enqueued": bool(facts.get("enqueued", False)),
        "worker": facts.get("worker"),
    }


def best_trials(study: Study) -> list[FrozenTrial]:
    """The best trial, or with several objectives all that no other trial beats in every one of them."""
    complete = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    if not complete:
        return []
    if len(study.metrics) > 1:
        return sorted(study.optuna.best_trials, key=lambda trial: trial.number)
    sign = 1 if study.directions == ["minimize"] else -1
    return [min(complete, key=lambda trial: (sign * trial.values[0], trial.number))]


def importances(study: Study) -> dict[str, dict[str, float]]:
    """The share of each dimension in what makes a trial good (Optuna's PED-ANOVA); nothing from too few trials."""
    found = {}
    for i, metric in enumerate(study.metrics):
        target = None if len(study.metrics) == 1 else (lambda trial, i=i: trial.values[i])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[metric] = get_param_importances(study.optuna, target=target)
        except (OptunaError, ValueError, RuntimeError):
            continue
    return found


def write_best(
    study: Study, trial: FrozenTrial, cfg: Config, choices: dict[str, str | None], plain: Config, path: Path
) -> None:
    """The best trial's configuration as a file that Hydra composes: ``--config-dir FOLDER --config-name best``.

    ``choices`` are those of ``BEST_GROUPS``, ``plain`` is what they give as they are: the file names the choices and
    what differs from them, so that another choice on the command line takes effect.
    """
    differs = {section: changes(getattr(plain, section), getattr(cfg, section)) for section in SECTIONS}
    for key in MACHINE:
        differs["trainer"].pop(key, None)
    name = path.stem
    groups = [{f"override {group}": choice} for group, choice in choices.items()]
    own = {section: given for section, given in differs.items() if given}
    body = {"defaults": ["config", *groups, "_self_"], "sweep": {"name": f"{study.root.name}-{name}"}, **own}
    values = ", ".join(f"{metric} {value:.6g}" for metric, value in zip(study.metrics, trial.values, strict=True))
    text = f"# Trial {trial.number} of the search {study.name}: {values} (one seed). Over other seeds:\n"
    seeds = ",".join(map(str, fresh_seeds(cfg)))
    text += f"#   python -m hybrid.train -m --config-dir {study.root} --config-name {name} 'sweep.seeds=[{seeds}]'\n"
    if trial.user_attrs.get("code") != code_version():
        text += "# It was trained by another version of the code.\n"
    with storage_errors(str(path)):
        write_text_atomically(path, text + yaml.safe_dump(body, sort_keys=False))


def changes(before: Any, after: Any) -> dict[str, Any]:
    """The keys of a section, and of the sections in it, whose values differ, with their values after."""
    found: dict[str, Any] = {}
    for option in dataclasses.fields(after):
        old, new = getattr(before, option.name), getattr(after, option.name)
        if dataclasses.is_dataclass(new):
            new, old = changes(old, new), {}
        if new != old:
            found[option.name] = new
    return found


def print_outcome(console: Console, study: Study) -> None:
    """Counts, the best trials, what pruning saved, and each trial that failed with its reason and log."""
    trials, progress = study.trials(), study.progress()
    elsewhere = study.elsewhere()
    counts = {"complete": progress.complete, "pruned": progress.pruned, "failed": progress.failed,
              "being run by other workers": elsewhere,
              "unfinished": max(0, progress.left - elsewhere)}  # fmt: skip
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "complete")
    told += f" of {progress.n_trials} trials" if progress.ended <= progress.n_trials else " trials"
    console.print(f"{study.name}: {told}", soft_wrap=True, markup=False)
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and "steps" in t.user_attrs]
    run, whole = (sum(trial.user_attrs[key] for trial in ended) for key in ("steps", "max_steps"))
    if run < whole:
        console.print(f"pruning saved {1 - run / whole:.0%} of the steps ({run:,} instead of {whole:,})")
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if complete:
        console.print(top_table(study, complete))
    for trial in trials:
        if trial.state == TrialState.FAIL:
            facts = trial.user_attrs
            log = f" (log: {study.root / facts['folder'] / 'log.txt'})" if "folder" in facts else ""
            console.print(
                f"trial {trial.number} failed: {facts.get('reason', 'no reason was recorded')}{log}",
                soft_wrap=True, markup=False,
            )  # fmt: skip


def top_table(study: Study, complete: list[FrozenTrial]) -> Table:
    best = best_trials(study)
    if len(study.metrics) == 1:
        sign = 1 if study.directions == ["minimize"] else -1
        rows = sorted(complete, key=lambda trial: (sign * trial.values[0], trial.number))[:TOP]
    else:
        rows = best
    table = Table(title="best trials" if len(study.metrics) == 1 else "trials that none beats in every objective")
    keys = [dimension.key for dimension in study.space.dimensions]
    for column in ("trial", *study.metrics, *keys):
        table.add_column(column, overflow="fold", justify="right")
    for trial in rows:
        params = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in (trial.params.get(key, "") for key in keys))
        table.add_row(*map(Text, (str(trial.number), *(f"{value:.6g}" for value in trial.values), *params)))
    return table
