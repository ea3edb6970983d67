"""Flags on arms whose runs failed a gate or trained on at a reduced learning rate."""

from __future__ import annotations

from analysis.comparison.flags import Flag
from analysis.health.gates import GATES, Health, worst_rows


def health_flags(health: Health, runs_per_arm: dict[str, int], arms: list[str]) -> list[Flag]:
    """A flag per arm and failed gate, and per arm whose learning rate a rule reduced, in the order of ``arms``.

    Runs that stopped early have a flag already (``comparison.flags``).
    """
    flags = []
    for row in worst_rows(health.gates, arms, least="fail"):
        name = f"gate {row['gate']}" + (f" ({GATES[row['gate']]})" if row["gate"] in GATES else "")
        text = f"{name} fails in {row['count']} of {row['runs']} runs"
        flags.append(Flag(row["arm"], "gate", text + (f", e.g. {row['reading']}" if row["reading"] else "")))
    reduced = health.events[(health.events["action"] == "reduce_lr") & health.events["acted"].astype(bool)]
    for arm in arms:
        own = reduced[reduced["arm"] == arm]
        if len(own):
            count = len(own[["seed_init", "seed_data"]].drop_duplicates())
            rules = ", ".join(dict.fromkeys(own["rule"]))
            steps = own["step"].dropna()
            when = f", first at step {int(steps.min()):,}" if len(steps) else ""
            text = f"learning rate reduced in {count} of {runs_per_arm[arm]} runs (rule {rules}{when})"
            flags.append(Flag(arm, "reduced", text))
    return sorted(flags, key=lambda flag: arms.index(flag.arm))
