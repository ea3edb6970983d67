"""All figures of a comparison, from its runs, their logged steps and their configurations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis.compare import Comparison
from analysis.configs import Flat, crossings
from analysis.curves import LostRun, drawn_arms, learning_curves
from analysis.forest import final_loss
from analysis.frames import Logged, StepReader
from analysis.gate_values import gate_values
from analysis.gradient_ratio import gradient_ratio
from analysis.interaction import interaction, learning_rates
from analysis.records import Records
from analysis.style import arm_styles, look, save
from analysis.tradeoffs import tradeoffs

MOST_LOST = 20  # curves of runs that do not count
NAMES = (
    "final_loss",
    "learning_curves",
    "learning_rates",
    "interaction",
    "gate_values",
    "gradient_ratio",
    "tradeoffs",
)


@dataclass(frozen=True)
class Drawn:
    """A figure that was written: ``folder``/``name``.png and .svg."""

    name: str
    title: str
    caption: str
    png: Path
    svg: Path
    narrow: bool = False  # one panel: not to be stretched over the whole page


def draw(folder: Path, name: str, title: str, caption: str, figure: Figure, narrow: bool = False) -> Drawn:
    """Write a figure as PNG and SVG."""
    png, svg = save(figure, folder / name)
    return Drawn(name, title, caption, png, svg, narrow)


def drop_stale(folder: Path, written: list[Drawn]) -> None:
    """Remove figures of an earlier report that this one has no data for; other files there are left alone."""
    kept = {path for drawn in written for path in (drawn.png, drawn.svg)}
    for path in (*folder.glob("*.png"), *folder.glob("*.svg")):
        if path not in kept and (path.stem in NAMES or path.stem.startswith("search_")):
            path.unlink()


@dataclass(frozen=True)
class Curves:
    """What the figures need of the metrics: of the arms that are drawn, and of runs that do not count."""

    steps: Logged  # ``run`` is the index of comparison.runs
    lost: list[LostRun]
    unreadable: dict[Path, int]


def read_curves(comparison: Comparison, records: Records, reader: StepReader) -> Curves:
    """Read the metrics of the arms that are drawn."""
    drawn = np.flatnonzero(comparison.runs["arm"].isin(drawn_arms(comparison)))
    columns = ("step", "loss", "val_loss", "grad_ratio")
    # comparison.runs has the order of records.runs
    logged = reader.read([records.runs[i].path for i in drawn], columns, lists=("gate_mean",))
    for frame in (logged.rows, *logged.lists.values()):
        frame["run"] = drawn[frame["run"].to_numpy(dtype=int)]
    with_curve = [item for item in records.left_out if item.path and item.arm and item.kind != "duplicate"][:MOST_LOST]
    others = reader.read([item.path for item in with_curve if item.path], columns)
    rows = others.rows
    lost = [LostRun(str(item.arm), item.kind, rows[rows["run"] == i]) for i, item in enumerate(with_curve)]
    return Curves(logged, lost, logged.unreadable | others.unreadable)


def write_figures(
    folder: Path, comparison: Comparison, records: Records, configs: dict[str, Flat], curves: Curves
) -> list[Drawn]:
    """Write every figure that there is data for, final_loss and learning_curves first.

    ``configs`` is configs.arm_configs.
    """
    written = []
    with look():
        for name, title, caption, figure in _figures(comparison, records, configs, curves):
            one_arm = name == "final_loss" and len(comparison.arms) == 1
            narrow = one_arm or name in ("gradient_ratio", "learning_rates")
            written.append(draw(folder, name, title, caption, figure, narrow))
    return written


def _figures(
    comparison: Comparison, records: Records, configs: dict[str, Flat], curves: Curves
) -> Iterator[tuple[str, str, str, Figure]]:
    """Name, title, caption and figure of each."""
    runs, metric, baseline = comparison.runs, comparison.metric, comparison.baseline.arm
    arms = drawn_arms(comparison)
    styles = arm_styles(records.arms, baseline, comparison.arms)
    caption = "Every seed, the mean and its 95% t interval"
    if len(comparison.arms) > 1:
        caption += f"; at the right, the differences from {baseline} with the same seed, which cancels what a seed does"
        caption += " to all arms"
    yield "final_loss", "Final loss of every arm", f"{caption}.", final_loss(comparison, records.left_out, styles)
    steps = curves.steps.rows
    losses = learning_curves(comparison, steps, curves.lost, styles)
    caption = "Loss against optimiser step. The first steep fall is cut off so that the arms can be told apart."
    yield "learning_curves", "Learning curves", caption, losses

    crossed = crossings({arm: config for arm, config in configs.items() if arm in arms})
    rates = learning_rates(runs, metric, crossed, styles)
    if rates:
        caption = "A best point at either end of a curve says that the range was too narrow."
        yield "learning_rates", "Learning rates", caption, rates
    crossing = interaction(runs, metric, crossed, styles)
    if crossing:
        caption = "How one factor acts at each level of the others: parallel lines mean that it acts the same on all."
        yield "interaction", "Factors", caption, crossing
    named = [arm for arm in arms if styles[arm].named]  # grey lines without a name would say nothing here
    others = f" Of {len(comparison.arms)} arms, the best {len(named)}." if len(named) < len(comparison.arms) else ""
    gates = gate_values(curves.steps.lists["gate_mean"], runs, named, styles)
    if gates:
        caption = "Mean gate of every layer at each evaluation, from its start at step 0 as it was measured."
        yield "gate_values", "Gates", caption + others, gates
    ratio = gradient_ratio(steps, runs, named, styles)
    if ratio:
        caption = "Gate G4 passes from 0.3 to 3, warns from 0.1 to 0.3 and from 3 to 10, and fails outside."
        yield "gradient_ratio", "Gradient ratio", caption + others, ratio
    costs = tradeoffs(runs, metric, arms, styles)
    if costs:
        caption = "What a lower loss costs. Costs in which all arms are within 1% of each other are not shown."
        yield "tradeoffs", "Loss against cost", caption, costs
