"""Which arm the others are compared with."""

from __future__ import annotations

import difflib
from collections import defaultdict
from dataclasses import dataclass

from analysis.records.runs import Records


class UnknownArm(ValueError):
    """A baseline that cannot be used; the message is one line that names the arms there are."""


@dataclass(frozen=True)
class Baseline:
    """The arm that the others are compared with, and how it came to be that one."""

    arm: str
    source: str  # "given" by the caller, "sweep" (named in sweep.json), "best_mean" (chosen after looking)
    note: str = ""  # why the sweep's own baseline is not the one, if it is not


def choose_baseline(records: Records, requested: str | None, metric: str) -> Baseline:
    """``requested``, else the baseline of the sweep's plan, else the arm with the lowest mean of ``metric``.

    Raises UnknownArm if ``requested`` has no usable run. ``records`` must hold at least one.
    """
    labels = records.arms
    if requested is not None:
        if requested in labels:
            return Baseline(requested, "given")
        close = difflib.get_close_matches(requested, labels, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        known = ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")
        raise UnknownArm(f"no usable run of an arm {requested!r}{hint} Arms here: {known}")

    planned = {plan.baseline: plan for plan in records.plans if plan.baseline}
    found = {label for arm, plan in planned.items() for label in (arm, f"{plan.folder}/{arm}") if label in labels}
    if len(found) == 1 and len(planned) == 1:
        return Baseline(found.pop(), "sweep")
    note = ""
    if len(planned) > 1:
        note = f"The sweeps here name different baselines ({', '.join(sorted(map(str, planned)))})."
    elif planned:
        note = f"The sweep's baseline, {next(iter(planned))}, has no usable run of that name."

    values = defaultdict(list)
    for run in records.runs:
        values[run.arm].append(float(run.summary[metric]))
    return Baseline(min(labels, key=lambda arm: sum(values[arm]) / len(values[arm])), "best_mean", note)
