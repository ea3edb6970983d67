"""The rule by which a difference counts as shown, and the tests it is made of.

Arms run on the same seed blocks. The primary test is the arm + block model: its residual, pooled over all arms, has
(arms - 1)(blocks - 1) degrees of freedom where a pair of arms alone has blocks - 1. Against a baseline named beforehand
p is adjusted as Dunnett's, against one chosen by its result as Tukey's (all pairs).

Pooling is only right where all differences vary alike, and with three to ten seeds no test can vouch for that. By
simulation (three seeds, one of eight equal arms with five times the spread) pooled tests alone cry wolf in 18% of
sweeps instead of 5%, and in 7 to 16% if they hide behind a preliminary test at any level. So two guards:

* A difference counts only if its own paired t test, on its own spread, has p < 0.05 too. The adjusted p is the larger
  of the two: the pooled test answers for the number of comparisons, the paired one for the spread of this pair.
* A noisy baseline makes every comparison noisy at once, which the first guard does not see. Therefore the baseline's
  spread is tested against the others' at a liberal level (``check_level``); where it stands out, paired t tests with
  Holm's correction decide instead, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from analysis.statistics.blocks import BlockFit, fit_blocks, spread_test
from analysis.statistics.elementary import all_pairs_p, holm_adjust
from analysis.statistics.families import Family, all_pairs, dunnett

ALPHA = 0.05
FEW_SEEDS = 5


def check_level(seeds: int) -> float:
    """The level of the test of the baseline's spread, by the baseline's seeds.

    Liberal, because a miss costs more than a false alarm: 0.25, below five seeds 0.4. With two seeds the test sees
    nothing, so that the residual of more than two arms is never pooled (level 1).
    """
    return 1.0 if seeds < 3 else 0.4 if seeds < FEW_SEEDS else 0.25


@dataclass(frozen=True)
class Inference:
    """Arrays [..., arms], the baseline's own entries NaN, unless said otherwise; differences are arm minus baseline."""

    fit: BlockFit
    family: Family
    pairs: np.ndarray  # [arms] shared blocks
    difference: np.ndarray  # mean over shared blocks
    sd: np.ndarray  # of the paired differences
    p_paired: np.ndarray  # one comparison alone
    adjusted_difference: np.ndarray  # of the block model: the same unless cells are missing
    standard_error: np.ndarray  # of the adjusted difference, from the pooled residual
    p_block: np.ndarray  # Dunnett's or Tukey's
    p_holm: np.ndarray  # paired t with Holm over the same family
    p_spread: np.ndarray  # [...] is the baseline noisier than the others?
    pooled: np.ndarray  # [...] whether the pooled residual is trusted
    p_adjusted: np.ndarray  # what the verdict goes by

    @property
    def shown(self) -> np.ndarray:
        return self.p_adjusted < ALPHA


def infer(values: np.ndarray, baseline: int, every_pair: bool = False) -> Inference:
    """Compare all arms of ``values`` [..., arms, blocks] (NaN: missing) with the arm ``baseline``.

    ``every_pair``: the baseline was chosen by its result, so that all pairs count as comparisons. Every arm needs two
    blocks in common with the baseline. Leading dimensions are independent experiments with the same missing cells.
    """
    fit = fit_blocks(values)
    family = all_pairs(fit.covariance) if every_pair else dunnett(fit.covariance, baseline)
    differences = values - values[..., baseline, None, :]
    pairs, mean, sd, p_paired = _paired(differences, baseline)
    adjusted, error = fit.against(baseline)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_block = family.p(np.where(p_paired == p_paired, adjusted / error, np.nan), fit.df)
    p_holm = _holm_over_family(values, p_paired, baseline, every_pair)
    p_spread = spread_test(values, baseline) if values.shape[-2] > 2 else np.full(values.shape[:-2], np.nan)
    seeds = int(pairs[baseline])
    pooled = ~(p_spread < check_level(seeds)) if seeds > 2 or values.shape[-2] == 2 else np.zeros(p_spread.shape, bool)
    guarded = np.where(np.sign(adjusted) == np.sign(mean), np.maximum(p_block, p_paired), 1.0)
    guarded = np.where(np.isnan(p_paired), np.nan, guarded)
    p_adjusted = np.where(pooled[..., None], guarded, p_holm)
    return Inference(
        fit, family, pairs, mean, sd, p_paired, adjusted, error, p_block, p_holm, p_spread, pooled, p_adjusted
    )


def _paired(differences: np.ndarray, baseline: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shared = np.isfinite(differences)
    pairs = shared.reshape(-1, *shared.shape[-2:])[0].sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(shared, differences, 0.0).sum(axis=-1) / pairs
        off = np.where(shared, differences - mean[..., None], 0.0)
        sd = np.sqrt((off**2).sum(axis=-1) / (pairs - 1))
        p = 2 * stdtr(pairs - 1, -np.abs(mean) / (sd / np.sqrt(pairs)))
    # Equal differences leave rounding noise in the sd, about 1e-16 of a loss; a t from that would be meaningless.
    p = np.where((pairs > 1) & (sd > 1e-12 * np.maximum(1.0, np.abs(mean))), p, np.nan)
    own = np.arange(len(pairs)) == baseline
    return pairs, np.where(own, np.nan, mean), np.where(own, np.nan, sd), np.where(own, np.nan, p)


def _holm_over_family(values: np.ndarray, p_paired: np.ndarray, baseline: int, every_pair: bool) -> np.ndarray:
    if not every_pair:
        return holm_adjust(p_paired)
    p = all_pairs_p(values)
    first, second = np.triu_indices(p.shape[-1], 1)
    adjusted = np.full_like(p, np.nan)
    adjusted[..., first, second] = holm_adjust(p[..., first, second])
    return np.where(np.arange(p.shape[-1]) < baseline, adjusted[..., :, baseline], adjusted[..., baseline, :])
