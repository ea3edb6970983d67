"""What the GPU did while an arm trained: gpu.jsonl of the first run of every arm, as lines over time."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import FAINT, ArmStyle, name_arms
from analysis.records.json_files import number
from analysis.records.metrics_files import complete_lines
from analysis.records.runs import Run

FILE = "gpu.jsonl"
MOST_SAMPLES = 2000  # of one run that are read, evenly spaced
MOST_POINTS = 250  # of one line: medians of so many stretches
_PAUSE = 10  # times the usual distance of two samples; longer ones are interruptions
# reading, title of its panel, what one unit of the axis is
PANELS = (
    ("utilisation_percent", "Utilisation, %", 1.0),
    ("memory_bytes", "Memory held on the GPU, GiB", 2.0**30),
    ("temperature_c", "Temperature, \N{DEGREE SIGN}C", 1.0),
    ("power_w", "Power, W", 1.0),
)


def read_gpu(runs: Sequence[Run], arms: Sequence[str]) -> dict[str, pd.DataFrame]:
    """By arm, of its first run that has samples: ``minutes`` of training and a column per reading of ``PANELS``.

    Interruptions of a run count for no time. Arms without samples are left out.
    """
    found: dict[str, pd.DataFrame] = {}
    wanted = set(arms)
    for run in runs:
        if run.arm in wanted and run.arm not in found and (run.path / FILE).exists():
            samples = _read(run)
            if len(samples):
                found[run.arm] = samples
    return {arm: found[arm] for arm in arms if arm in found}


def _read(run: Run) -> pd.DataFrame:
    lines = complete_lines(run.path / FILE).splitlines()
    rows = []
    for i in np.unique(np.linspace(0, len(lines) - 1, min(MOST_SAMPLES, len(lines))).astype(int)):
        try:
            sample = json.loads(lines[i])
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict):
            rows.append([number(sample.get(name)) for name in ("time", *(panel[0] for panel in PANELS))])
    frame = pd.DataFrame(rows, columns=["time", *(panel[0] for panel in PANELS)])
    frame = frame[frame["time"].notna()].sort_values("time", ignore_index=True)
    frame.insert(0, "minutes", minutes(frame.pop("time").to_numpy(dtype=float)))
    stretch = np.arange(len(frame)) * MOST_POINTS // max(len(frame), MOST_POINTS)
    return frame.groupby(stretch).median()


def minutes(times: np.ndarray) -> np.ndarray:
    """Seconds since the epoch as minutes since the first, with interruptions cut to the usual distance."""
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    steps = np.where(steps > _PAUSE * usual, usual, steps)
    return np.concatenate([[0.0], np.cumsum(steps)])[: len(times)] / 60


def gpu_use(samples: dict[str, pd.DataFrame], styles: dict[str, ArmStyle]) -> Figure | None:
    """A panel per reading, a line per arm; None without samples."""
    panels = [p for p in PANELS if any(frame[p[0]].notna().any() for frame in samples.values())]
    if not panels:
        return None
    figure = Figure(figsize=(9.6, max(2.1 * -(-len(panels) // 2) + 0.7, 0.19 * len(samples) + 0.8)))
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False, sharex=True).ravel()
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.06, right=0.97, top=1 - 0.35 / height, bottom=0.55 / height, wspace=0.15, hspace=0.32)
    longest = max(float(frame["minutes"].iloc[-1]) for frame in samples.values())
    scale, unit = (60.0, "hours") if longest >= 180 else (1.0, "minutes") if longest >= 3 else (1 / 60, "seconds")
    for ax, (name, title, one) in zip(axes, panels, strict=False):
        for order, (arm, frame) in enumerate(reversed(samples.items())):
            look = {"color": styles[arm].colour, "ls": styles[arm].line, "lw": min(styles[arm].width, 1.5)}
            points = {"marker": styles[arm].marker, "ms": 4} if len(frame) <= 12 else {}
            ax.plot(frame["minutes"] / scale, frame[name] / one, zorder=3 + 0.01 * order, **look, **points)
        ax.set_title(title, fontsize=9.5)
        highest = max(float(np.nanmax(frame[name], initial=0.0)) for frame in samples.values()) / one
        ax.set_ylim(0, 105 if name == "utilisation_percent" else 1.12 * highest or 1.0)
        ax.set_xlim(0, longest / scale)
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(f"{unit} of training")
    name_arms(figure, list(samples), styles)
    words = "The first run of every arm, without interruptions. Memory: of all processes on that GPU."
    figure.text(0.06, -0.005, words, color=FAINT, fontsize=8.5, va="top")
    return figure
