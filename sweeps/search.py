"""The sweeper's side of a search: checks everything, starts the workers, and says what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from hybrid.arguments import plain_key
from hybrid.config import ConfigError, read_composed, resolve
from hybrid.progress import duration
from hybrid.run import PlannedRun, SweepFailed, check_data, fit_to_corpus, plan, probe
from hybrid.schema import Config, SearchConfig, SweepConfig
from sweeps.expand import SEED_KEYS, Groups, Job, expand, hydra_value, name_of_axes
from sweeps.outcome import BEST_GROUPS, best_trials, file_name, print_outcome, write_best, write_search_file
from sweeps.sampling import rehearse
from sweeps.setting import setting_of
from sweeps.space import Space, from_command_line
from sweeps.study import Study
from sweeps.worker import loader_of

Compose = Callable[[Sequence[str]], DictConfig]


@dataclass
class Arm:
    """One arm of the sweep with its study."""

    job: Job
    cfg: Config
    study: Study
    run: PlannedRun  # one corner of the space, to measure
    corner: list[str]  # the overrides that make it


def plan_search(sweep: SweepConfig, arguments: list[str], compose: Compose) -> list[Arm]:
    """Every arm's space composed at its ends, its study opened or made. Raises ``ConfigError`` and ``StudyError``.

    A dimension on the command line (``optim.lr=tag(log,interval(1e-4,1e-2))``, ``fusion=choice(gated,gain)``) replaces
    that of the space or is added, a single value takes it out, and so does a value that an arm has of its own, for that
    arm; a plain list (``fusion=gated,gain``) of what is not in the space makes arms.
    """
    for params in sweep.search.enqueue:
        if not isinstance(params, dict):
            raise ConfigError(f"sweep.search.enqueue must be a list of {{key: value}}, got {params} in it")
    space, fixed, rest = read_dimensions(sweep.search.space, arguments)
    jobs = expand(replace(sweep, search=SearchConfig()), rest)
    name = sweep.name or name_of_axes(arguments)
    names = [job.variant for job in jobs]
    if len(set(names)) < len(names):
        raise ConfigError("a search trains one seed a trial: set seed_init and seed_data, not several seeds")
    arms = []
    of_arms = {line for lines in sweep.arms.values() for line in lines}
    for job in jobs:
        clash = {plain_key(line) for line in job.overrides if line not in of_arms} & space.keys() - fixed.keys()
        if clash:
            raise ConfigError(f"{sorted(clash)[0]} is both set and searched; leave one out")
        set_here = {plain_key(line): line.partition("=")[2] for line in job.overrides}
        left = without(space, {**fixed, **set_here})
        if space and not left:
            where = f"arm {job.variant}" if job.variant else "this command"
            raise ConfigError(f"{where} sets all that is searched ({', '.join(space)}); leave one out")
        gone = space.keys() - left.keys()  # of a known baseline they are then no part either
        known = [{key: value for key, value in params.items() if key not in gone} for params in sweep.search.enqueue]
        arms.append(plan_arm(job, name, left, [params for params in known if params], compose, sweep.dry_run))
    return arms


def read_dimensions(space: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The space with what the command line says of it, the keys that it fixes, and the arguments that are left."""
    space, fixed, rest = dict(space), {}, []
    for line, override in zip(
        arguments, OverridesParser.create(config_loader=Groups()).parse_overrides(arguments), strict=True
    ):
        key = override.key_or_group
        value = override.value()
        chosen = isinstance(value, ChoiceSweep) and not value.simple_form
        drawn = (isinstance(value, IntervalSweep | RangeSweep) or chosen) and key not in SEED_KEYS
        if override.is_sweep_override() and (drawn or key in space):
            found = from_command_line(override)
            if found is None:
                raise ConfigError(f"{line}: this cannot be a dimension of a search")
            when = space[key].get("when") if isinstance(space.get(key), dict) else None
            space[key] = found | ({"when": when} if when else {})
            continue
        if key in space:
            fixed[key] = line.partition("=")[2]
        rest.append(line)
    return space, fixed, rest


def without(space: dict[str, Any], fixed: dict[str, str]) -> dict[str, Any]:
    """The space where some of its dimensions have one value: they, and what hangs on other values of them, go."""
    left = {}
    for key, described in space.items():
        if key in fixed:
            continue
        when = described.get("when") if isinstance(described, dict) else None
        if isinstance(when, dict):
            settled = {k: v if isinstance(v, list) else [v] for k, v in when.items() if k in fixed and k in space}
            if any(fixed[k] not in [hydra_value(x) for x in values] for k, values in settled.items()):
                continue
            described = described | {"when": {k: v for k, v in when.items() if k not in settled}}
        left[key] = described
    return left


def plan_arm(
    job: Job, name: str, described: dict[str, Any], enqueue: list[dict[str, Any]], compose: Compose, preview: bool
) -> Arm:
    """Raises ``ConfigError`` for a corner of the space that is no configuration."""
    space = Space(described)
    variant = [f"variant='{job.variant}'"] if job.variant else []
    runs = []
    corpus, setting = None, {}
    corners = [space.overrides(corner) for corner in space.corners()]
    for corner in corners:
        try:
            cfg = resolve(compose([*job.overrides, *variant, *corner]))
            cfg.sweep.name = name
            if corpus is None:
                corpus = check_data(cfg)
                setting = setting_of(cfg, corpus)
            fit_to_corpus(cfg, corpus)
            runs.append(plan(cfg, corpus, job.variant or "trial"))
        except ConfigError as error:
            raise ConfigError(f"sweep.search.space at {', '.join(corner)}: {error}") from error
    cfg = runs[0].cfg
    search = cfg.sweep.search
    search.space, search.enqueue = described, enqueue
    search.study_name = "-".join(part for part in (search.study_name or name, job.variant) if part)
    if search.n_trials is None or search.n_trials < 1:
        raise ConfigError(f"sweep.search.n_trials must be at least 1, got {search.n_trials}")
    if search.workers is not None and search.workers < 1:
        raise ConfigError(f"sweep.search.workers must be at least 1, got {search.workers}")
    if search.n_trials < len(search.enqueue):
        raise ConfigError(
            f"sweep.search.n_trials={search.n_trials} is below the {len(search.enqueue)} of sweep.search.enqueue, "
            "which are trials as well"
        )
    rehearse(search, space)
    root = runs[0].folder.path.parent
    study = Study(search, search.study_name, root, create=True, preview=preview, setting=setting)
    return Arm(job, cfg, study, runs[0], corners[0])


def batch_of(arms: list[Arm], at_once: int) -> list[list[str]]:
    """The overrides of the workers' jobs: those of the first arm, then those of the next."""
    started = time.time()
    batch = []
    for arm in arms:
        search = arm.study.search
        for _ in range(min(search.workers or at_once, arm.study.progress().left)):
            batch.append(
                [
                    *arm.job.overrides,
                    *arm.corner,  # only so that the job as such is a configuration: trials have values of their own
                    "~sweep.search.space",
                    f"+sweep.search.space={hydra_value(arm.study.space.describe())}",
                    *([f"variant='{arm.job.variant}'"] if arm.job.variant else []),
                    f"sweep.name='{arm.cfg.sweep.name}'",
                    f"sweep.search.study_name='{search.study_name}'",
                    f"display.sweep_started={started}",
                ]
            )
    return batch


def headline(arms: list[Arm]) -> str:
    root = arms[0].study.root
    progress = [arm.study.progress() for arm in arms]
    total, ended = sum(p.n_trials for p in progress), sum(p.ended for p in progress)
    studies = f"{len(arms)} studies, " if len(arms) > 1 else ""
    done = f", {ended} already done" if ended else ""
    return f"{arms[0].cfg.sweep.name}: a search of {studies}{total} trials{done} -> {root}"


def show_plan(console: Console, arms: list[Arm]) -> None:
    """Every study with its space, what is done, and the time that it would take without pruning."""
    for arm in arms:
        progress, search = arm.study.progress(), arm.study.search
        console.print(f"{arm.study.name} in {arm.study.where}", soft_wrap=True, markup=False)
        for key, told in arm.study.space.describe().items():
            console.print(f"  {key}: {told}", soft_wrap=True, markup=False)
        names = [str(part["_target_"]).rpartition(".")[2] for part in (search.sampler, search.pruner)]
        seconds = probe(arm.run)
        console.print(
            f"  {names[0]}, {names[1]}; {progress.left} of {progress.n_trials} trials left, {duration(seconds)} each, "
            f"at most {duration(seconds * progress.left)} one after another on this machine as busy as it is now",
            soft_wrap=True, markup=False,
        )  # fmt: skip


def conclude(console: Console, arms: list[Arm], compose: Compose, errors: list[str]) -> None:
    """Say and write what was found. Raises ``SweepFailed`` if a trial failed (not: diverged) or is unfinished."""
    failed = unfinished = 0
    for error in errors:
        console.print(f"a worker ended early: {error}", soft_wrap=True, markup=False)
    for arm in arms:
        study = arm.study
        print_outcome(console, study)
        file = write_search_file(study, arm.cfg, importance=True)
        best = best_trials(study)
        if best:
            path = study.root / file_name("best", arm.job.variant, ".yaml")
            composed = compose([*arm.job.overrides, *study.space.overrides(best[0].params)])
            choices = OmegaConf.to_container(composed.hydra.runtime.choices)
            groups = {group: choice for group, choice in choices.items() if group in BEST_GROUPS}
            lines = [f"{group}={choice}" for group, choice in groups.items() if choice is not None]
            plain = loader_of(composed.hydra).load_configuration("config", lines, run_mode=RunMode.RUN)
            write_best(study, best[0], resolve(composed), groups, read_composed(plain), path)
            console.print(f"best configuration: {path}", soft_wrap=True, markup=False)
        console.print(f"all trials: {file}", soft_wrap=True, markup=False)
        again = [trial for trial in study.trials() if trial.user_attrs.get("again")]
        failed += len(again)
        unfinished += max(0, study.progress().left - study.elsewhere())
        if again:
            console.print("failed trials are tried again only with sweep.retry_failed=true")
    if failed or unfinished:
        parts = [f"{count} {word}" for count, word in ((failed, "failed"), (unfinished, "unfinished")) if count]
        raise SweepFailed(f"trials of the search: {', '.join(parts)}")
