"""What the figures of the branches share: a panel per arm, looks for branches, colours of maps with numbers in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from analysis.diagnosis.records import FULL
from analysis.diagnosis.words import path_name
from analysis.figures.style import FAINT, GRID, INK, PAPER, ArmStyle, shorten

MOST_PANELS = 8  # arms that are drawn; the tables have all
MOST_LAYERS = 40  # rows of a map
MAP = "cividis"  # as dark to light for the colour-blind as for others
# Not the ink of the page, which is swapped in the dark: the colours of a map stay what they are.
_DARK, _LIGHT = "#000000", "#ffffff"
_MIDDLE = 0.179  # the luminance from which black letters have more contrast than white ones
_LOOKS = ((0, (5, 1.4)), "o", True), ((0, (1.2, 1.2)), "s", False), ((0, (6, 1.4, 1.2, 1.4)), "^", True)


def drawn_arms(arms: Sequence[str], baseline: str) -> list[str]:
    """At most ``MOST_PANELS`` of ``arms`` (best first), the baseline among them if it is there."""
    kept = list(arms[:MOST_PANELS])
    if baseline in arms and baseline not in kept:
        kept[-1] = baseline
    return kept


def arm_panels(
    arms: Sequence[str],
    styles: dict[str, ArmStyle],
    width: float,
    height: float | Sequence[float],
    columns: int,
    share: bool = True,
    right: float = 0.2,
) -> tuple[Figure, list[Axes]]:
    """A panel per arm with its name over a bar in its colour. Sizes of one panel in inches, ``height`` also by arm.

    ``share``: one scale on all panels. ``right``: inches beside the panels, for a legend or a scale of colours.
    """
    heights = [height] * len(arms) if isinstance(height, int | float) else list(height)
    columns = min(columns, len(arms))
    rows = math.ceil(len(arms) / columns)
    left, top, bottom, gap, between = 0.65, 0.45, 0.55, 0.28 if share else 0.5, 0.62 if share else 0.85
    row_heights = [max(heights[i * columns : (i + 1) * columns]) for i in range(rows)]
    whole = left + columns * width + (columns - 1) * gap + right
    tall = top + sum(row_heights) + (rows - 1) * between + bottom
    figure = Figure(figsize=(whole, tall))
    ratios = {"height_ratios": row_heights}
    axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False, gridspec_kw=ratios).ravel()
    figure.subplots_adjust(
        left=left / whole, right=1 - right / whole, top=1 - top / tall, bottom=bottom / tall,
        wspace=gap / width, hspace=between * rows / sum(row_heights),
    )  # fmt: skip
    for i, (ax, own) in enumerate(zip(axes, heights, strict=False)):
        place = ax.get_position()
        part = own / row_heights[i // columns] * place.height  # of the height, the upper part
        ax.set_position((place.x0, place.y1 - part, place.width, part))
    for ax, arm in zip(axes, arms, strict=False):
        ax.set_title(shorten(arm, int(12 * width)), fontsize=9.5, pad=8)
        above = ax.transAxes + ScaledTranslation(0, 3.5 / 72, figure.dpi_scale_trans)
        bar = {"transform": above, "clip_on": False, "solid_capstyle": "butt"}
        ax.plot([0, 1], [1, 1], color=styles[arm].colour, lw=3, ls="-", **bar)
    for ax in axes[len(arms) :]:
        ax.set_visible(False)
    for i, ax in enumerate(axes[: len(arms)]):
        if i + columns < len(arms):
            ax.tick_params(labelbottom=not share)
        elif share:
            ax.tick_params(labelbottom=True)
    return figure, list(axes[: len(arms)])


def bottom_axes(axes: Sequence[Axes]) -> list[Axes]:
    """The panels below which there is none, which is where labels of a shared x axis belong."""
    last = {ax.get_subplotspec().colspan.start: ax for ax in axes}
    return list(last.values())


def left_axes(axes: Sequence[Axes]) -> list[Axes]:
    return [ax for ax in axes if ax.get_subplotspec().is_first_col()]


def branch_look(path: str) -> tuple[object, str | None, bool]:
    """Line, marker and whether it is filled: the same for the first branch of every arm, and for the second.

    All paths together are a plain line. Colours belong to the arms.
    """
    return ("-", None, True) if path == FULL else _LOOKS[_slot(path)]


def _slot(branch: str) -> int:
    return 1 if branch == "mamba" or branch.endswith("_b") else 0 if branch == "rwkv" or branch.endswith("_a") else 2


def name_branches(figure: Figure, paths: Sequence[str], lines: bool = True) -> None:
    """Which line or marker is which branch, right of the panels; names that share a look stand together."""
    by_look: dict[tuple[object, str | None, bool], list[str]] = {}
    for path in paths:
        by_look.setdefault(branch_look(path), []).append(path_name(path))
    handles = [
        Line2D([], [], color=FAINT, ls=line if lines else "", marker=mark or "", ms=5, mew=1.2,
               mfc=FAINT if filled else PAPER, lw=2.0 if mark is None else 1.5)
        for line, mark, filled in by_look
    ]  # fmt: skip
    names = [", ".join(own) + (" only" if lines and look[1] else "") for look, own in by_look.items()]
    right = figure.subplotpars.right + 0.12 / figure.get_figwidth()
    place = {"loc": "upper left", "bbox_to_anchor": (right, figure.subplotpars.top), "frameon": False}
    figure.legend(handles, names, handlelength=3.0 if lines else 1.0, labelspacing=0.4, fontsize=9, **place)


def number_map(
    ax: Axes, values: np.ndarray, norm: Normalize, words: np.ndarray | None = None, size: float = 7.5
) -> None:
    """A map of ``values`` [rows, columns], the first row on top, with ``words`` in its cells; NaN stays empty."""
    edges = np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5
    # Squares of vectors: an embedded picture would not be shown by the page, which allows none. Smoothed edges would
    # let the paper shine through between them.
    ax.pcolormesh(*edges, np.ma.masked_invalid(values), norm=norm, cmap=MAP, linewidth=0, antialiased=False)
    ax.set_ylim(values.shape[0] - 0.5, -0.5)
    ax.grid(False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if words is not None:
        for (row, column), value in np.ndenumerate(values):
            if value == value:
                ink = _LIGHT if _luminance(colormaps[MAP](norm(value))) < _MIDDLE else _DARK
                ax.text(column, row, words[row, column], color=ink, ha="center", va="center", fontsize=size)


def colour_scale(figure: Figure, norm: Normalize, label: str, ticks: Sequence[float] | None = None) -> None:
    """The scale of the maps' colours, right of the panels."""
    whole, tall = figure.get_size_inches()
    pars = figure.subplotpars
    height = min(figure.axes[0].get_position().height, 2.6 / tall)
    ax = figure.add_axes((pars.right + 0.18 / whole, pars.top - height, 0.13 / whole, height))
    scale = figure.colorbar(ScalarMappable(norm, MAP), cax=ax, ticks=ticks)
    scale.solids.set_rasterized(False)  # see number_map
    scale.solids.set_antialiased(False)
    scale.outline.set_visible(False)
    scale.set_label(label, fontsize=8.5, color=INK)
    ax.grid(False)
    ax.minorticks_off()
    ax.tick_params(labelsize=8, color=GRID)


def remark(figure: Figure, text: str) -> None:
    """A line of small print below the figure."""
    figure.text(figure.subplotpars.left, -0.005, text, color=FAINT, fontsize=8.5, va="top")


def layer_numbers(layers: Sequence[int]) -> list[str]:
    return [str(layer + 1) for layer in layers]


def _luminance(colour: tuple[float, float, float, float]) -> float:
    """Relative luminance of an sRGB colour, WCAG 2.1."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
