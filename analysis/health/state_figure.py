"""State health over training: cosine of successive states as specified and calibrated, and effective rank."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.diagnosis.words import branch_name
from analysis.figures.over_steps import MOST_BANDS, draw_band, draw_line, is_log, step_axis, step_range, thin_out
from analysis.figures.style import FAINT, ArmStyle, name_arms
from analysis.health.probes import READINGS

_TITLES = {
    "cosine": "cosine of successive states",
    "novelty": "novelty (calibrated)",
    "effective_rank": "effective rank",
}
_LABELS = {"cosine": "highest", "novelty": "lowest", "effective_rank": "median"}
G35 = 0.95, 0.99  # G3.5: a cosine of successive states warns from the first and fails above the second
_COSINES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
_LEAST = 1e-6  # of what is drawn on a logarithmic axis


def state_health(probes: pd.DataFrame, arms: list[str], styles: dict[str, ArmStyle]) -> Figure | None:
    """A row of panels per branch, a line per arm; None without probes. ``probes`` is ``probes.read_probes``'s table."""
    shown = [arm for arm in arms if (probes["arm"] == arm).any()]
    names = [name for name in READINGS if probes[name].notna().any()]
    branches = list(dict.fromkeys(probes["branch"]))
    if not shown or not names:
        return None
    height = max(2.3 * len(branches) + 0.8, 0.19 * len(shown) + 0.8)
    figure = Figure(figsize=(3.7 * len(names) + 0.6, height))
    axes = figure.subplots(len(branches), len(names), squeeze=False, sharex=True)
    figure.subplots_adjust(
        left=0.2 / len(names), right=0.97, top=1 - 0.35 / height, bottom=0.55 / height, wspace=0.28, hspace=0.3
    )
    tables = {
        (branch, name): {arm: _table(probes, arm, branch, name) for arm in shown}
        for branch in branches
        for name in names
    }
    first, last = step_range(tables.values())
    log = is_log(first, last)
    for i, branch in enumerate(branches):
        for j, name in enumerate(names):
            ax = axes[i, j]
            _panel(ax, {arm: t for arm, t in tables[branch, name].items() if len(t)}, styles, name, log)
            ax.set_title(f"{branch_name(branch)}: {_TITLES[name]}", fontsize=9.5)
            ax.set_ylabel(_LABELS[name], fontsize=8.5)
            step_axis(ax, first, last, log)
            if i < len(branches) - 1:
                ax.set_xlabel("")
    name_arms(figure, shown, styles)
    words = "Highest and lowest: the worst head of all layers; median: over layers; means over seeds"
    spread = ", bands: range of the seeds" if len(shown) <= MOST_BANDS and probes["run"].nunique() > len(shown) else ""
    dashes = "; dashes: where gate G3.5 begins to warn and to fail by default"
    figure.text(0.2 / len(names), -0.005, f"{words}{spread}{dashes}.", color=FAINT, fontsize=8.5, va="top")
    return figure


def _table(probes: pd.DataFrame, arm: str, branch: str, name: str) -> pd.DataFrame:
    """Steps by runs of one arm, as far as all of its probed runs go."""
    own = probes[(probes["arm"] == arm) & (probes["branch"] == branch) & probes[name].notna()]
    return own.pivot_table(index="step", columns="run", values=name).dropna()


def _panel(ax: Axes, tables: dict[str, pd.DataFrame], styles: dict[str, ArmStyle], name: str, log: bool) -> None:
    for order, (arm, table) in enumerate(reversed(tables.items())):
        # A cosine close to 1 is told apart by what it lacks of it.
        shown = (1 - table).clip(lower=_LEAST) if name == "cosine" else table
        thinned = thin_out(shown, log)
        if len(tables) <= MOST_BANDS:
            draw_band(ax, thinned, styles[arm])
        draw_line(ax, thinned.mean(axis=1), styles[arm], 3 + 0.01 * order)
    if name == "cosine":
        ax.set_yscale("log")
        for edge in G35:
            ax.axhline(1 - edge, color=FAINT, lw=0.9, ls=(0, (4, 2)), zorder=1)
        ax.invert_yaxis()
        ax.yaxis.set_major_locator(FixedLocator([1 - tick for tick in _COSINES]))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:.6g}"))
    elif name == "novelty" and tables:
        values = np.concatenate([table.to_numpy().ravel() for table in tables.values()])
        for edge in G35:  # the novelty that a calibrated cosine stands for
            ax.axhline((1 - edge**2) ** 0.5, color=FAINT, lw=0.9, ls=(0, (4, 2)), zorder=1)
        if values.min() > 0 and values.max() > 30 * values.min():
            ax.set_yscale("log")
