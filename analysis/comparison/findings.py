"""What a sweep says beyond arm against baseline: factors, learning rates, firmness of the ranking, false alarms."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from analysis.comparison.baseline import Baseline
from analysis.comparison.learning_rates import LearningRates, learning_rates
from analysis.comparison.settings import LEARNING_RATE, Crossing, Settings, factors
from analysis.statistics.factorial import Factorial, factorial
from analysis.statistics.false_alarms import FalseAlarms, false_alarms
from analysis.statistics.ranks import Settling, first_places, mean_curves, settling

AA_SWEEP = "aa_check"
_AA_SEEDS = (3, 5)
_MOST_ARMS_IN_FACTORS = 100
FEWEST_RANKED = 5  # seeds; two or three agree by chance, and a bootstrap of them would call that certain


@dataclass
class Findings:
    """Each is None or empty where the sweep has no such thing. ``settling`` is filled by ``add_settling``."""

    settings: dict[str, Settings] = field(default_factory=dict)  # by arm: the overrides that differ
    crossing: Crossing | None = None  # the factors, also where ``factorial`` is None
    factorial: Factorial | None = None
    factorial_note: str = ""  # why a crossing was not analysed
    learning_rates: LearningRates | None = None
    first_places: pd.Series | None = None  # by arm: share of bootstrap samples of the seeds in which it is best
    blocks_ranked: int = 0  # seeds that all arms have, which ``first_places`` draws from
    settling: Settling | None = None
    false_alarms: list[FalseAlarms] = field(default_factory=list)

    def add_settling(self, steps: pd.DataFrame, runs: pd.DataFrame) -> None:
        """Find from which step on the final ranking stands; ``steps`` as of ``StepReader.read`` with val_loss."""
        self.settling = settling(mean_curves(steps, runs))


def find(
    table: pd.DataFrame, settings: dict[str, Settings], baseline: Baseline, metric: str, sweeps: list[str]
) -> Findings:
    """Everything that follows from ``table`` (arms by blocks, as of ``compare.block_table``, without arms that cannot
    be compared) and the arms' ``settings``; ``sweeps`` are the names of the sweeps in the records."""
    found = Findings({arm: own for arm, own in settings.items() if arm in table.index})
    if baseline.arm not in table.index:
        return found
    found.learning_rates = learning_rates(table, found.settings, baseline, metric)
    rates = {own.get(LEARNING_RATE) for own in found.settings.values()}
    if len(rates) == 1 and 4 <= len(found.settings) <= _MOST_ARMS_IN_FACTORS and len(found.settings) == len(table):
        crossed = factors(found.settings)
        if crossed:
            crossed = found.crossing = crossed.from_baseline(baseline.arm)
            cells = [crossed.cells[arm] for arm in table.index]
            found.factorial = factorial(table.to_numpy(dtype=float), crossed.factors, cells)
            if found.factorial is None:
                names = " x ".join(factor.name for factor in crossed.factors)
                found.factorial_note = f"{names}: too few runs for a factorial analysis (one seed, or runs missing)."
    if len(table) > 1:
        values = table.to_numpy(dtype=float)
        found.blocks_ranked = int(pd.notna(table).all(axis=0).sum())
        shares = first_places(values) if found.blocks_ranked >= FEWEST_RANKED else None
        found.first_places = None if shares is None else pd.Series(shares, index=table.index, name="first")
    if set(table.index) == {"a", "b"} and any(AA_SWEEP in name for name in sweeps):
        first, second = table.loc["a"].to_numpy(dtype=float), table.loc["b"].to_numpy(dtype=float)
        estimates = [false_alarms(first, second, seeds) for seeds in _AA_SEEDS]
        found.false_alarms = [one for one in estimates if one]
    return found
