"""The tables: raw numbers for CSV files, and the same in words for Markdown, HTML and the terminal."""

from __future__ import annotations

from collections import Counter

import pandas as pd
from scipy.special import stdtrit

from analysis.comparison.compare import Comparison
from analysis.records.frames import PARTS
from analysis.records.runs import LeftOut, Records
from analysis.records.together import size_words
from analysis.statistics.elementary import CONFIDENCE
from analysis.tables.table import DASH, Cell, Table, interval_cell, number_cell, p_cell, signed_cell, spread_cell

# Over seeds, these get a mean and a standard deviation each.
AVERAGED = (
    "final_train_loss",
    "final_val_loss",
    "best_val_loss",
    "val_bits_per_byte",
    "grad_ratio",
    "peak_memory_bytes",
    "tokens_per_second",
    "wall_seconds",
)
LOST = ("diverged", "failed", "unfinished", "missing")
MIB = 2**20
TOGETHER = "Together"  # the column


def comparison_frame(comparison: Comparison, records: Records) -> pd.DataFrame:
    """One row per arm, best mean first, raw numbers; ``_sd`` columns are over seeds (n - 1), ``_low`` and
    ``_high`` the 95% t interval of the mean; empty for one seed.

    Arms of which no run is usable stand at the end, without numbers.
    """
    lost = {arm: Counter() for arm in comparison.arms}
    for item in records.left_out:
        if item.arm and item.kind not in ("duplicate", "foreign"):
            lost.setdefault(item.arm, Counter())[item.kind] += 1
    groups = comparison.runs.groupby("arm")
    frame = pd.DataFrame({"seeds": groups.size(), "params_total": groups["params_total"].mean()})
    frame["steps_min"], frame["steps_max"] = groups["steps"].min(), groups["steps"].max()
    frame["members_min"], frame["members_max"] = groups["members"].min(), groups["members"].max()
    frame["tokens_mean"] = groups["tokens"].mean()
    for name in AVERAGED:
        frame[f"{name}_mean"], frame[f"{name}_sd"] = groups[name].mean(), groups[name].std(ddof=1)
        count = groups[name].count()
        half = stdtrit((count - 1).where(count > 1), (1 + CONFIDENCE) / 2) * frame[f"{name}_sd"] / count**0.5
        frame[f"{name}_low"] = frame[f"{name}_mean"] - half
        frame[f"{name}_high"] = frame[f"{name}_mean"] + half
    for name in (*(f"params_{part}" for part in PARTS[1:]), "state_floats", "flops_per_token"):
        frame[name] = groups[name].mean()
    frame = frame.reindex(list(lost))
    frame["seeds"] = frame["seeds"].fillna(0).astype(int)
    gates = _gate_counts(records)
    for verdict, name in (("pass", "passed"), ("warn", "warned"), ("fail", "failed")):
        frame[f"gates_{name}"] = [gates.get(arm, Counter())[verdict] for arm in frame.index]
    frame["gates_checked"] = frame[["gates_passed", "gates_warned", "gates_failed"]].sum(axis=1)
    for kind in LOST:
        frame[f"runs_{kind}"] = [count[kind] for count in lost.values()]
    frame.insert(0, "is_baseline", frame.index == comparison.baseline.arm)
    return frame.rename_axis("arm").reset_index()


def left_out_frame(left_out: list[LeftOut]) -> pd.DataFrame:
    """One row per run that does not count."""
    columns = ["folder", "arm", "seed_init", "seed_data", "kind", "reason", "last_step", "run_id"]
    frame = pd.DataFrame([[getattr(item, column) for column in columns] for item in left_out], columns=columns)
    return frame.astype({column: "Int64" for column in ("seed_init", "seed_data", "last_step")})


def comparison_table(frame: pd.DataFrame) -> Table:
    """The specification's result table: means over seeds, +- their standard deviation where there are two seeds.

    A last column says how many runs trained together where any did (``records.together.NOTE`` says what that means).
    """
    header = ["Model", "Params", "Seeds", "Steps", "Final Train Loss", "Final Val Loss", "Best Val Loss", "Bits/byte"]
    header += ["RWKV/Mamba Ratio", "Memory", "Tok/s"]
    together = bool((frame["members_max"] > 1).any())
    header += [TOGETHER] if together else []
    rows = []
    for place, row in enumerate(frame.to_dict("records")):
        lost = [f"{row[f'runs_{kind}']} {kind}" for kind in LOST]
        lost = [words for words in lost if not words.startswith("0 ")]
        steps = f"{row['steps_min']:,.0f}" if row["steps_min"] == row["steps_min"] else DASH
        if row["steps_max"] > row["steps_min"]:
            steps += f"\N{EN DASH}{row['steps_max']:,.0f}"
        memory = row["peak_memory_bytes_mean"] / MIB
        speed, ratio = row["tokens_per_second_mean"], row["grad_ratio_mean"]
        rows.append(
            [
                Cell(row["arm"] + (" (baseline)" if row["is_baseline"] and len(frame) > 1 else ""), place),
                number_cell(row["params_total"], 0),
                Cell(str(row["seeds"]) + (f" ({', '.join(lost)})" if lost else ""), row["seeds"]),
                Cell(steps, number_cell(row["steps_max"], 0).sort),
                *(
                    spread_cell(row[f"{name}_mean"], row[f"{name}_sd"], 4)
                    for name in ("final_train_loss", "final_val_loss", "best_val_loss")
                ),
                spread_cell(row["val_bits_per_byte_mean"], row["val_bits_per_byte_sd"], 3),
                number_cell(ratio, 2 if ratio >= 0.1 else 4),
                Cell(f"{memory:,.0f} MiB", memory) if memory == memory else Cell(DASH),
                number_cell(speed, 0),
                *([_together_cell(row["members_min"], row["members_max"])] if together else []),
            ]
        )
    return Table(header, rows)


def _together_cell(low: float, high: float) -> Cell:
    return Cell(size_words(low, high), high) if high == high else Cell(DASH)


def sizes_table(frame: pd.DataFrame) -> Table:
    """What the arms cost: parameters by part, recurrent state, arithmetic, and the gates that their runs passed."""
    parts = [part for part in PARTS if (frame[f"params_{part}"].fillna(0) > 0).any()]
    header = ["Model", *(part.capitalize() for part in parts), "State floats", "FLOPs/token", "Gates passed"]
    rows = []
    for place, row in enumerate(frame.to_dict("records")):
        numbers = [number_cell(row[name], 0) for name in (*(f"params_{part}" for part in parts), "state_floats")]
        gates = f"{row['gates_passed']} of {row['gates_checked']}" if row["gates_checked"] else DASH
        warned = f" ({row['gates_warned']} warned)" if row["gates_warned"] else ""
        numbers += [number_cell(row["flops_per_token"], 0), Cell(gates + warned, row["gates_passed"])]
        rows.append([Cell(row["arm"], place), *numbers])
    return Table(header, rows)


def _gate_counts(records: Records) -> dict[str, Counter]:
    """Verdicts of all gates of all runs of an arm; what a record holds instead of a verdict counts for none."""
    counts: dict[str, Counter] = {}
    for run in records.runs:
        gates = run.summary.get("gates")
        for gate in gates.values() if isinstance(gates, dict) else ():
            if isinstance(gate, dict) and gate.get("verdict") in ("pass", "warn", "fail"):
                counts.setdefault(run.arm, Counter())[gate["verdict"]] += 1
    return counts


DIFFERENCE_WORDS = (
    "Would show: the difference that so many seeds find in four of five sweeps. Seeds needed: to find the one seen as "
    "often. Sign-flip p: of the one comparison, without the assumption of a normal distribution."
)


def difference_table(comparison: Comparison) -> Table:
    """The paired differences of the report's metric, in words."""
    header = ["Model", "Pairs", "Difference", "95% interval", "p (adjusted)", "Below baseline in"]
    header += ["Sign-flip p", "Would show (80%)", "Seeds needed"]
    rows = []
    frame = comparison.differences[comparison.differences["metric"] == comparison.metric]
    for place, row in enumerate(frame.to_dict("records")):
        some = row["pairs"] > 0
        rows.append(
            [
                Cell(row["arm"], place),
                Cell(str(row["pairs"]), row["pairs"]),
                signed_cell(row["difference"]),
                interval_cell(row["low"], row["high"]),
                p_cell(row["p_adjusted"]),
                Cell(f"{row['better_in']} of {row['pairs']}" if some else DASH, row["better_in"]),
                number_cell(row["p_sign_flip"], 3),
                number_cell(row["smallest_detectable"], 4),
                number_cell(row["seeds_needed"], 0),
            ]
        )
    return Table(header, rows)
