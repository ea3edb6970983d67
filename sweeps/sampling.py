"""What a search asks of Optuna: objectives, sampler and pruner, checked before anything is trained."""

from __future__ import annotations

import difflib
import importlib
import warnings
from typing import Any

import optuna
from hydra.errors import HydraException
from hydra.utils import instantiate
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, QMCSampler

from hybrid.config import ConfigError
from hybrid.schema import SearchConfig
from sweeps.space import Space


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
    seed = arguments.get("seed")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise ConfigError(f"{where}.seed must be a whole number from 0, got {seed}")
    if seed is not None and not issubclass(cls, QMCSampler):
        arguments["seed"] = (seed * 1_000_003 + number) % 2**32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return instantiate(arguments)
    except (HydraException, TypeError, ValueError, ImportError) as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{where}: {type(cause).__name__}: {cause}") from error
