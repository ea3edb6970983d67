"""All figures of a report, from a comparison and the logged steps of its runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.compare import Comparison
from analysis.curves import LostRun, drawn_arms, learning_curves
from analysis.forest import final_loss
from analysis.frames import steps_frame
from analysis.records import Records
from analysis.style import arm_styles, look, save

MOST_LOST = 20  # curves of runs that do not count


def write_figures(folder: Path, comparison: Comparison, records: Records) -> tuple[dict[str, Path], list[str]]:
    """Write learning_curves and final_loss as PNG and SVG.

    Returns the paths by file name, and a remark for every run whose metrics were partly unreadable.
    """
    drawn = np.flatnonzero(comparison.runs["arm"].isin(drawn_arms(comparison)))
    steps, unreadable = steps_frame([records.runs[i].path for i in drawn])  # comparison.runs has the same order
    steps["run"] = drawn[steps["run"].to_numpy(dtype=int)]
    with_curve = [item for item in records.left_out if item.path and item.arm and item.kind != "duplicate"][:MOST_LOST]
    lost_steps, also = steps_frame([item.path for item in with_curve if item.path])
    lost = [LostRun(str(item.arm), item.kind, lost_steps[lost_steps["run"] == i]) for i, item in enumerate(with_curve)]
    remarks = [
        f"{path.relative_to(records.directory).as_posix()}/metrics.jsonl: {count} unreadable lines skipped"
        for path, count in (unreadable | also).items()
    ]
    styles = arm_styles(records.arms, comparison.baseline.arm, comparison.arms)
    written: dict[str, Path] = {}
    with look():
        curves = learning_curves(comparison, steps, lost, styles)
        forest = final_loss(comparison, records.left_out, styles)
        for name, figure in (("learning_curves", curves), ("final_loss", forest)):
            written |= {path.name: path for path in save(figure, folder / name)}
    return written, remarks
