"""The whole rule on sweeps without any difference: at most 5% of them may show one, whatever the spreads."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.statistics.inference import infer

SPREADS = {
    "equal": lambda arms: np.ones(arms),
    "one noisy arm": lambda arms: np.r_[np.ones(arms - 1), 3.0],
    "noisy baseline": lambda arms: np.r_[3.0, np.ones(arms - 1)],
    "slightly noisy baseline": lambda arms: np.r_[2.0, np.ones(arms - 1)],
    "half of the arms noisy": lambda arms: np.r_[np.ones(arms // 2), np.full(arms - arms // 2, 3.0)],
}


def sweeps_without_difference(count, arms, seeds, spread, missing, random):
    """Losses [count, arms, seeds]: a shift per seed that all arms share, and noise with the arm's own spread."""
    values = random.normal(size=(count, arms, seeds)) * SPREADS[spread](arms)[:, None]
    values += 3 * random.normal(size=(count, 1, seeds))
    if missing:
        values[(slice(None), *missing)] = np.nan
    return values


def false_positives(values, every_pair):
    """Share of sweeps in which a difference is shown; with ``every_pair`` from the arm with the lowest mean."""
    if not every_pair:
        return infer(values, 0).shown.any(axis=-1).mean()
    chosen = np.nanmean(values, axis=-1).argmin(axis=-1)
    wrong = [infer(values[chosen == arm], arm, True).shown.any(axis=-1).sum() for arm in np.unique(chosen)]
    return sum(wrong) / len(values)


def at_most_5_percent(share, count):
    return share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.parametrize(
    ("arms", "seeds", "spread", "every_pair", "missing"),
    [
        (4, 5, "equal", False, None),
        (8, 3, "noisy baseline", False, None),
        (8, 5, "one noisy arm", False, None),
        (4, 5, "half of the arms noisy", True, None),
        (4, 5, "equal", False, (1, 0)),
    ],
)
def test_false_positives_of_small_simulations(arms, seeds, spread, every_pair, missing):
    values = sweeps_without_difference(1500, arms, seeds, spread, missing, np.random.default_rng(arms * seeds))
    assert at_most_5_percent(false_positives(values, every_pair), len(values))


def test_the_simulation_can_fail():
    """Without its guards the rule is wrong far too often: that is what the simulations would see."""
    values = sweeps_without_difference(1500, 8, 5, "noisy baseline", None, np.random.default_rng(1))
    found = infer(values, 0)
    assert not at_most_5_percent((found.p_block < 0.05).any(axis=-1).mean(), 1500)
    guarded = np.maximum(found.p_block, found.p_paired)  # without the check of the baseline's spread
    assert not at_most_5_percent((guarded < 0.05).any(axis=-1).mean(), 1500)
    assert not at_most_5_percent((found.p_paired < 0.05).any(axis=-1).mean(), 1500)


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("arms", [2, 4, 8])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_positives_of_5000_sweeps(arms, seeds, spread):
    """Also with a missing cell of an arm, with one of the baseline, and with a baseline chosen by its result."""
    random = np.random.default_rng(1000 * arms + seeds)
    shares = {}
    for missing in (None, (1, 0), (0, 0)):
        values = sweeps_without_difference(5000, arms, seeds, spread, missing, random)
        shares[str(missing)] = false_positives(values, every_pair=False)
        if missing != (0, 0):
            shares[f"{missing}, every pair"] = false_positives(values, every_pair=True)
    print({what: round(100 * share, 2) for what, share in shares.items()})
    assert all(at_most_5_percent(share, 5000) for share in shares.values()), shares
