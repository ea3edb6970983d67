"""What the figures need of the metrics: of which runs it is read, and reading it while other things are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.records.metrics_files import thinning
from analysis.records.runs import LeftOut, Records
from analysis.records.steps import Logged, Reading, StepReader

if TYPE_CHECKING:
    from analysis.comparison.compare import Comparison

MOST_ARMS = 100  # by their mean; further ones are not drawn
MOST_LOST = 20  # curves of runs that do not count
_COLUMNS = ("step", "loss", "val_loss", "grad_ratio")


@dataclass(frozen=True)
class LostRun:
    """A run that does not count, whose curve is shown all the same."""

    arm: str
    kind: str
    steps: pd.DataFrame


@dataclass(frozen=True)
class Curves:
    """What the figures need of the metrics: of the arms that are drawn, and of runs that do not count."""

    steps: Logged  # ``run`` is the index of comparison.runs
    lost: list[LostRun]
    unreadable: dict[Path, int]
    train_every: int = 1  # of the training rows, only every so many-th was read


def drawn_arms(comparison: Comparison) -> list[str]:
    """The arms whose curves are drawn, best mean first: the best ``MOST_ARMS`` and the baseline."""
    return _drawn(comparison.arms, comparison.baseline.arm)


def _drawn(arms: Sequence[str], baseline: str) -> list[str]:
    return [arm for i, arm in enumerate(arms) if i < MOST_ARMS or arm == baseline]


class CurveReading:
    """Curves on their way: ``result`` waits for them and can be had once."""

    def __init__(
        self, runs: pd.DataFrame, arms: Sequence[str], baseline: str, records: Records, reader: StepReader
    ) -> None:
        """Begin to read the metrics of the arms that are drawn; ``arms`` are all, as of ``frames.best_first``, and
        ``runs`` is ``frames.runs_frame`` of the runs of ``records``."""
        self._drawn = np.flatnonzero(runs["arm"].isin(_drawn(arms, baseline)))
        paths = [records.runs[i].path for i in self._drawn]  # runs has the order of records.runs
        self._train_every = thinning(paths)
        self._steps: Reading = reader.start(paths, _COLUMNS, ("gate_mean",), self._train_every)
        with_curve = [item for item in records.left_out if item.path and item.arm and item.kind != "duplicate"]
        self._lost: list[LeftOut] = with_curve[:MOST_LOST]
        self._others: Reading = reader.start([item.path for item in self._lost if item.path], _COLUMNS)

    def result(self) -> Curves:
        logged, others = self._steps.result(), self._others.result()
        for frame in (logged.rows, *logged.lists.values()):
            frame["run"] = self._drawn[frame["run"].to_numpy(dtype=int)]
        rows = others.rows
        lost = [LostRun(str(item.arm), item.kind, rows[rows["run"] == i]) for i, item in enumerate(self._lost)]
        return Curves(logged, lost, logged.unreadable | others.unreadable, self._train_every)
