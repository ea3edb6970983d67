"""All figures of a comparison, from its runs, their logged steps and their configurations."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis.comparison.cautions import unlike_speeds
from analysis.comparison.compare import Comparison
from analysis.figures.curves import Curves, drawn_arms
from analysis.figures.factors import interaction, learning_rates
from analysis.figures.final_loss import final_loss
from analysis.figures.gate_values import gate_values
from analysis.figures.gradient_ratio import gradient_ratio
from analysis.figures.learning_curves import learning_curves
from analysis.figures.style import arm_styles, look, save, written_as
from analysis.figures.tradeoffs import SPEED, drawn_costs, tradeoffs
from analysis.records.runs import Records

MANY_RUNS = 500  # from here on figures are written beside the drawing of the next
# All that a report draws, also of other modules: what an earlier one drew and this one does not is removed.
NAMES = (
    "final_loss",
    "learning_curves",
    "learning_rates",
    "interaction",
    "gate_values",
    "gradient_ratio",
    "tradeoffs",
    *("branch_layers", "influence", "half_lives", "loss_by_position", "gate_drift", "gate_positions", "gate_classes"),
    *("state_health", "gpu"),
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


def write_figures(folder: Path, comparison: Comparison, records: Records, curves: Curves) -> list[Drawn]:
    """Write every figure that there is data for, final_loss and learning_curves first."""
    written = []
    beside = len(comparison.runs) >= MANY_RUNS and sys.platform == "linux"
    with look(), _Beside() if beside else nullcontext(save) as write:
        for name, title, caption, figure in _figures(comparison, records, curves):
            one_arm = name == "final_loss" and len(comparison.arms) == 1
            narrow = one_arm or name in ("gradient_ratio", "learning_rates")
            png, svg = write(figure, folder / name)
            written.append(Drawn(name, title, caption, png, svg, narrow))
    return written


class _Beside:
    """Writes figures in processes of their own while the next ones are drawn: half of the work of a large report.

    A child shares this process's memory and only renders. Where one fails, its figure is written here, so that the
    error is the same as without children.
    """

    def __enter__(self) -> Callable[[Figure, Path], list[Path]]:
        self._started: list[tuple[multiprocessing.process.BaseProcess, Figure, Path]] = []
        return self._write

    def _write(self, figure: Figure, path: Path) -> list[Path]:
        process = multiprocessing.get_context("fork").Process(target=save, args=(figure, path))
        process.start()
        self._started.append((process, figure, path))
        return written_as(path)

    def __exit__(self, kind: object, *_: object) -> None:
        for process, figure, path in self._started:
            process.join()
            if process.exitcode and kind is None:
                save(figure, path)


def _figures(comparison: Comparison, records: Records, curves: Curves) -> Iterator[tuple[str, str, str, Figure]]:
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
    thinned = f" Of the training log, every {curves.train_every}th row is drawn." if curves.train_every > 1 else ""
    yield "learning_curves", "Learning curves", caption + thinned, losses

    rates = learning_rates(runs, metric, comparison.findings.learning_rates, styles)
    if rates:
        caption = "A best point at either end of a curve says that the range was too narrow."
        yield "learning_rates", "Learning rates", caption, rates
    crossing = interaction(runs, metric, comparison.findings.crossing, styles)
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
        yield "gradient_ratio", "Gradient ratio", caption + others + thinned, ratio
    costs = tradeoffs(runs, metric, arms, styles)
    if costs:
        caption = "What a lower loss costs. Costs in which all arms are within 1% of each other are not shown."
        unlike = unlike_speeds(comparison, arms, "Speeds") if SPEED in drawn_costs(runs, arms) else []
        yield "tradeoffs", "Loss against cost", " ".join([caption, *unlike]), costs
