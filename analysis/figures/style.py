"""What every figure shares: one look per arm, ink, fonts, and labels that do not overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

# Okabe and Ito's colours without yellow and black (too faint on white, unseen on black), with olive and wine.
PALE = "#a3abb3"  # arms without a look of their own
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c2e", "#a8456f")
MARKERS = ("o", "s", "^", "v", "P", "X", "p", "h", "<", ">", "*", "d", "8", "H", (4, 1, 45))
LINES = ("-", (0, (4, 1.6)))  # the second time round the palette
MOST_COLOURED = 2 * len(PALETTE)  # arms beyond these are grey

# These four are swapped for the page's own colours where a figure stands in the page, so nothing else may use them.
INK, FAINT, GRID, PAPER = "#1b1f24", "#6a737d", "#e2e5e9", "#fefefe"

_RC = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "path",  # looks the same everywhere, whatever fonts are installed
}


@dataclass(frozen=True)
class ArmStyle:
    colour: str
    line: str | tuple
    marker: str | tuple
    named: bool = True  # False: one of too many arms, drawn grey and without a label
    width: float = 1.7


def arm_styles(arms: Sequence[str], baseline: str, best_first: Sequence[str]) -> dict[str, ArmStyle]:
    """One look per arm for all figures. ``arms`` is in a fixed order, so that a new result changes no colour.

    The baseline is drawn in ink. Of more arms than there are looks, the best ones get them.
    """
    others = [arm for arm in arms if arm != baseline]
    if len(others) > MOST_COLOURED:
        best = set([arm for arm in best_first if arm != baseline][:MOST_COLOURED])
        others = [arm for arm in others if arm in best]
    styles = {arm: ArmStyle(PALE, "-", ".", named=False, width=0.7) for arm in arms}
    for i, arm in enumerate(others):
        line = LINES[i // len(PALETTE)]
        styles[arm] = ArmStyle(PALETTE[i % len(PALETTE)], line, MARKERS[i % len(MARKERS)])
    styles[baseline] = ArmStyle(INK, "-", "D", width=2.2)
    return styles


@contextmanager
def look() -> Iterator[None]:
    """Matplotlib's settings for the figures of a report."""
    with matplotlib.rc_context(_RC):
        yield


def shorten(text: str, length: int = 36) -> str:
    """A long name with its middle left out; both ends tell arms apart."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"


def spread_out(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ``positions`` as little as a simple sweep can so that neighbours are ``gap`` apart, inside [low, high]."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    if len(order) > 1:
        gap = min(gap, (high - low) / (len(order) - 1))
    placed = [0.0] * len(positions)
    groups: list[list] = []  # [centre of the group's wishes, members], merged while they overlap
    for i in order:
        groups.append([[positions[i]], [i]])
        while len(groups) > 1 and _bottom(groups[-1], gap, low, high) < _top(groups[-2], gap, low, high) + gap * 0.999:
            wishes, members = groups.pop()
            groups[-1] = [groups[-1][0] + wishes, groups[-1][1] + members]
    for group in groups:
        bottom = _bottom(group, gap, low, high)
        for place, i in enumerate(group[1]):
            placed[i] = bottom + place * gap
    return placed


def _bottom(group: list, gap: float, low: float, high: float) -> float:
    wishes, members = group
    height = gap * (len(members) - 1)
    return min(max(sum(wishes) / len(wishes) - height / 2, low), high - height)


def _top(group: list, gap: float, low: float, high: float) -> float:
    return _bottom(group, gap, low, high) + gap * (len(group[1]) - 1)


def label_ends(
    ax: Axes,
    ends: Sequence[tuple[float, str, ArmStyle]],
    gap_points: float = 12.5,
    limits: tuple[float, float] | None = None,
) -> None:
    """Name curves at the right edge of ``ax``: ``ends`` holds the last y, the name and the look of each.

    ``limits`` is what y ranges over, by default the y axis (which has to be linear then).
    """
    figure = ax.get_figure()
    height_points = ax.get_position().height * figure.get_figheight() * 72
    low, high = limits or ax.get_ylim()
    wanted = [min(max((y - low) / (high - low), 0.0), 1.0) for y, _, _ in ends]
    placed = spread_out(wanted, gap_points / height_points, 0.0, 1.0)
    for start, y, (_, name, style) in zip(wanted, placed, ends, strict=True):
        outside = {"transform": ax.transAxes, "clip_on": False, "color": style.colour}
        ax.plot([1.0, 1.045], [start, y], lw=0.8, alpha=0.8, **outside)
        ax.plot([1.045, 1.165], [y, y], lw=style.width, ls=style.line, **outside)
        ax.plot([1.105], [y], marker=style.marker, ms=5, **outside)
        ax.text(1.18, y, shorten(name), transform=ax.transAxes, va="center", ha="left", fontsize=9)


def name_arms(figure: Figure, arms: Sequence[str], styles: dict[str, ArmStyle]) -> None:
    """The arms that have a look of their own, right of all panels."""
    named = [arm for arm in arms if styles[arm].named]
    looks = [styles[arm] for arm in named]
    handles = [Line2D([], [], color=s.colour, ls=s.line, marker=s.marker, ms=5, lw=s.width) for s in looks]
    place = {"loc": "center left", "bbox_to_anchor": (0.975, 0.5), "frameon": False}
    figure.legend(handles, list(map(shorten, named)), handlelength=3.2, labelspacing=0.35, fontsize=9, **place)


def written_as(path: Path) -> list[Path]:
    """The files that ``save`` writes."""
    return [path.with_name(f"{path.name}{suffix}") for suffix in (".png", ".svg")]


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path``.png (about 2,000 pixels wide) and ``path``.svg; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # "tight" would find the same for each format, each time with a drawing of its own.
    around = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer()).padded(0.12)
    for target, metadata in zip(written_as(path), ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        partial = path.with_name(f".{target.name}")
        with matplotlib.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(partial, format=target.suffix[1:], dpi=160, bbox_inches=around, metadata=metadata)
        if target.suffix == ".png":
            shrink(partial)
        partial.replace(target)
    return written_as(path)


def shrink(png: Path) -> None:
    """Lines and letters need few colours: with 256 of them a file is a third as large."""
    with Image.open(png) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(png, format="PNG", compress_level=6)
