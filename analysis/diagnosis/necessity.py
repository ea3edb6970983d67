"""What disturbing a branch costs, over seeds, and whether that is shown to be more than nothing and than chance.

Every disturbance has a control: the same outputs moved as far in random directions. A branch whose disturbance costs
no more than its control is not shown to matter: the model may only dislike being moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.diagnosis.records import ALL_LAYERS
from analysis.statistics.elementary import mean_sd, t_interval

INTERVENTIONS = {"zero": "Zeroed", "mean": "Its mean", "shuffle": "Shuffled"}  # in the order of tables and figures
_WINDOW_WIDTH = 1.96  # standard errors over validation windows, of which there are many


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95% interval: Student's over seeds, or from the windows where there is one seed."""

    mean: float
    half: float  # NaN where there is nothing to compute it from
    seeds: int

    @property
    def positive(self) -> bool:
        """Whether all of the interval is above zero; False without one."""
        return self.mean - self.half > 0

    @property
    def negative(self) -> bool:
        return self.mean + self.half < 0


@dataclass(frozen=True)
class Cost:
    """What one disturbance costs in one arm, nats per token."""

    increase: Interval
    control: Interval
    beyond: Interval  # increase minus control, inside each seed
    in_every_run: bool = False  # each model by itself, over its windows, is shown to need the branch

    @property
    def shown(self) -> bool:
        """Whether the branch is shown to matter: the increase, and its excess over the control, are above zero."""
        return self.increase.positive and self.beyond.positive


def over_seeds(values: np.ndarray, errors: np.ndarray) -> Interval:
    """The mean of ``values``, one per seed; ``errors`` are standard errors inside a seed, used if there is one only."""
    known = np.isfinite(values)
    values, errors = values[known], errors[known]
    if len(values) == 1:
        return Interval(float(values[0]), _WINDOW_WIDTH * float(errors[0]), 1)
    low, high = t_interval(values)
    return Interval(mean_sd(values)[0], (high - low) / 2, len(values))


def costs(necessity: pd.DataFrame) -> dict[tuple[str, int, str, str], Cost]:
    """By (arm, layer or ``ALL_LAYERS``, branch, intervention); ``necessity`` is the table of ``Diagnoses``."""
    found = {}
    keys = ["arm", "layer", "branch", "intervention"]
    for key, own in necessity.groupby(keys, sort=False):
        increase, error, control, control_error = (
            own[name].to_numpy(dtype=float) for name in ("increase", "error", "control", "control_error")
        )
        arm, layer, branch, intervention = key
        beyond, beyond_error = increase - control, np.hypot(error, control_error)
        alone = (increase > _WINDOW_WIDTH * error) & (beyond > _WINDOW_WIDTH * beyond_error)
        found[str(arm), int(layer), str(branch), str(intervention)] = Cost(
            over_seeds(increase, error),
            over_seeds(control, control_error),
            over_seeds(beyond, beyond_error),
            bool(alone.all()),
        )
    return found


def compare_branches(necessity: pd.DataFrame, arm: str, first: str, second: str, intervention: str) -> Interval:
    """How much more disturbing ``first`` everywhere costs than disturbing ``second``, inside each seed."""
    own = necessity[
        (necessity["arm"] == arm) & (necessity["layer"] == ALL_LAYERS) & (necessity["intervention"] == intervention)
    ]
    seeds = ["seed_init", "seed_data"]
    tables = [own.loc[own["branch"] == branch, [*seeds, "increase", "error"]] for branch in (first, second)]
    both = pd.merge(*tables, on=seeds, suffixes=("_first", "_second"))
    difference = (both["increase_first"] - both["increase_second"]).to_numpy(dtype=float)
    return over_seeds(difference, np.hypot(both["error_first"], both["error_second"]).to_numpy(dtype=float))
