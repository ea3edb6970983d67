"""Tables of what ``analysis.findings`` found, in words; their raw numbers go to CSV files."""

from __future__ import annotations

import math

import pandas as pd

from analysis.best_lr import OPTIMISTIC
from analysis.compare import Comparison
from analysis.factorial import words as factorial_words
from analysis.findings import Findings
from analysis.ranks import SETTLED
from analysis.settings import LEARNING_RATE
from analysis.tables import DASH, Cell, Table
from analysis.verdict import p_words, signed

PM = "\N{PLUS-MINUS SIGN}"
MOST_RATES = 12


TITLES = {
    "ratio": "Ratio of RWKV-6 to Mamba-2",
    "fusion": "Fusions",
    "factorial_terms": "Main effects and interactions",
    "factorial_effects": "Effects of levels, averaged over the other factors",
    "factorial_cells": "Means of the combinations",
    "learning_rates": "Loss by learning rate",
    "learning_rate_differences": "Differences at own best and at shared learning rates",
    "ranks": "How firm the first place is",
}


def remarks(findings: Findings) -> list[str]:
    """Everything found, in sentences."""
    said = list(factorial_words(findings.factorial)) if findings.factorial else []
    said += [findings.factorial_note] if findings.factorial_note else []
    rates = findings.learning_rates
    if rates:
        said += [
            f"{group}: the best learning rate is at the edge of the range tried; the true best may lie beyond."
            for group in rates.edges
        ]
        for row in _own_best(rates.differences):
            said.append(_rate_words(row))
        said.append(OPTIMISTIC)
    shares = findings.first_places
    if shares is not None:
        ahead = shares.sort_values(ascending=False).head(3)
        listed = ", ".join(f"{arm} in {share:.0%}" for arm, share in ahead.items() if share >= 0.005)
        said.append(f"Drawing the {findings.blocks_ranked} seeds anew, the lowest mean is that of {listed}.")
    settled = findings.settling
    if settled and len(settled.taus):
        if settled.settled is None:
            said.append("The ranking of the last step was not settled before it.")
        else:
            said.append(
                f"From step {settled.settled:,.0f} of {settled.taus.index[-1]:,.0f} on, the ranking is that of the "
                f"last step (Kendall's tau at least {SETTLED})."
            )
    for alarm in findings.false_alarms:
        said.append(
            f"The same arm under two names, {alarm.seeds} of {alarm.of} seeds: called different in {alarm.rate:.1%} of "
            f"{alarm.comparisons:,} comparisons (95% interval {alarm.low:.1%} to {alarm.high:.1%}, worth "
            f"{alarm.effective:.1f} independent ones; 5% is what the tests promise at most)."
        )
    return said


def _own_best(differences: pd.DataFrame) -> list[dict]:
    return differences[differences["at"] == "own best"].to_dict("records") if len(differences) else []


def _rate_words(row: dict) -> str:
    at = "each at its own best learning rate"
    size = f"{abs(row['difference']):.4f} {PM} {row['half_width']:.4f} nats"
    if math.isnan(row["p_adjusted"]):
        return f"{row['arm']} and {row['baseline']}, {at}: not tested (too few shared seeds)."
    evidence = f"{int(row['pairs'])} {row['test']} seeds, adjusted {p_words(row['p_adjusted'])}"
    if row["shown"]:
        verb = "beats" if row["difference"] < 0 else "is worse than"
        return f"{row['arm']} {verb} {row['baseline']} by {size} ({at}; {evidence})."
    return f"No difference shown between {row['arm']} and {row['baseline']} ({at}; {evidence})."


def factorial_tables(findings: Findings) -> dict[str, Table]:
    """``factorial_terms``, ``factorial_effects`` and ``factorial_cells``; empty without a factorial sweep."""
    found = findings.factorial
    if found is None:
        return {}
    terms = [
        [
            Cell(row["term"], i),
            Cell(f"{row['df']}, {row['df_residual']}", row["df"]),
            _number(row["f"], 2),
            _p(row["p"]),
            _number(row["partial_eta2"], 3),
        ]
        for i, row in enumerate(found.terms.to_dict("records"))
    ]
    named = {factor.name: factor for factor in found.factors}
    effects = [
        [
            Cell(named[row["factor"]].label(row["level"]), i),
            Cell(named[row["factor"]].label(row["against"])),
            Cell(signed(row["difference"]), row["difference"]),
            Cell(f"{signed(row['low'])} to {signed(row['high'])}", row["half_width"]),
            _p(row["p"]),
        ]
        for i, row in enumerate(found.effects.to_dict("records"))
    ]
    # Two factors: a row per level of the first, a column per level of the last; a third factor joins the rows.
    *outer, inner = found.factors
    cells = {tuple(row[f.name] for f in found.factors): row for row in found.cells.to_dict("records")}
    leading = list(dict.fromkeys(key[:-1] for key in cells))
    body = [
        [
            Cell(", ".join(key), i),
            *(_interval(cells[(*key, level)]) for level in inner.levels),
        ]
        for i, key in enumerate(leading)
    ]
    header = [" x ".join(f.name for f in outer), *map(inner.label, inner.levels)]
    return {
        "factorial_terms": Table(["Term", "df", "F", "p", "Partial eta squared"], terms),
        "factorial_effects": Table(["Level", "Against", "Difference", "95% interval", "p (unadjusted)"], effects),
        "factorial_cells": Table(header, body),
    }


def _interval(row: dict) -> Cell:
    return Cell(f"{row['mean']:.4f} {PM} {(row['high'] - row['low']) / 2:.4f}", row["mean"])


def learning_rate_tables(findings: Findings) -> dict[str, Table]:
    """``learning_rates``: loss by rate, a row per group; ``learning_rate_differences``: at the best and shared ones."""
    found = findings.learning_rates
    if found is None:
        return {}
    rates = sorted(found.table["lr"].unique())[:MOST_RATES]
    rows = []
    for i, (group, own) in enumerate(found.table.groupby("group", sort=False)):
        by_rate = {row["lr"]: row for row in own.to_dict("records")}
        best = next(row for row in by_rate.values() if row["best"])
        cells = [_mean_sd(by_rate[rate]) if rate in by_rate else Cell(DASH) for rate in rates]
        edge = " (edge of the range)" if best["edge"] else ""
        rows.append([Cell(str(group), i), *cells, Cell(f"{best['lr']:g}{edge}", best["lr"])])
    tables = {"learning_rates": Table(["Model", *(f"lr {rate:g}" for rate in rates), "Best lr"], rows)}
    if len(found.differences):
        body = [
            [
                Cell(row["arm"], i),
                Cell(row["at"]),
                Cell(str(row["pairs"]), row["pairs"]),
                _signed(row["difference"]),
                Cell(f"{signed(row['low'])} to {signed(row['high'])}" if row["low"] == row["low"] else DASH),
                _p(row["p_adjusted"]),
            ]
            for i, row in enumerate(found.differences.to_dict("records"))
        ]
        header = ["Model", "Learning rate", "Pairs", "Difference", "95% interval", "p (adjusted)"]
        tables["learning_rate_differences"] = Table(header, body)
    return tables


def _mean_sd(row: dict) -> Cell:
    spread = f" {PM} {row['sd']:.4f}" if row["sd"] == row["sd"] else ""
    return Cell(f"{row['mean']:.4f}{spread}{' *' if row['best'] else ''}", row["mean"])


def rank_table(findings: Findings, arms: list[str]) -> dict[str, Table]:
    """``ranks``: how often each arm comes first when the seeds are drawn anew."""
    shares = findings.first_places
    if shares is None:
        return {}
    rows = [[Cell(arm, i), Cell(f"{shares[arm]:.1%}", shares[arm])] for i, arm in enumerate(arms) if arm in shares]
    return {"ranks": Table(["Model", "First in bootstrap of seeds"], rows)}


def phase_tables(comparison: Comparison, findings: Findings) -> dict[str, Table]:
    """The tables of the two phases: ``ratio`` where gates, gains or whole models differ, ``fusion`` where fusions do.

    A row per arm, best mean first: what it sets, the loss, RWKV's gradient over Mamba's, the difference from the
    baseline. Empty where arms differ in neither.
    """
    settings = {arm: own for arm, own in findings.settings.items() if arm in comparison.arms}
    keys = sorted({key for own in settings.values() for key in own})
    fusions = {own["fusion"] for own in settings.values() if "fusion" in own}
    tables = {}
    if {"fusion.gate_init", "fusion.gain_init", "gate_init", "model.pattern"} & set(keys):
        tables["ratio"] = _phase_table(comparison, settings, keys)
    if len(fusions) > 2 and LEARNING_RATE not in keys:
        tables["fusion"] = _phase_table(comparison, settings, keys)
    return tables


def _phase_table(comparison: Comparison, settings: dict[str, dict[str, str]], keys: list[str]) -> Table:
    groups = comparison.runs.groupby("arm")
    means, sds = groups[comparison.metric].mean(), groups[comparison.metric].std(ddof=1)
    ratios, params = groups["grad_ratio"].mean(), groups["params_total"].mean()
    rows = []
    for i, arm in enumerate(arm for arm in comparison.arms if arm in settings):
        cells = [Cell(settings[arm].get(key, DASH)) for key in keys]
        loss = _mean_sd({"mean": means[arm], "sd": sds[arm], "best": False})
        row = [Cell(arm, i), *cells, _number(params[arm], 0), loss, _number(ratios[arm], 3)]
        if arm == comparison.baseline.arm:
            row += [Cell("baseline", 0.0), Cell(DASH), Cell(DASH)]
        else:
            d = comparison.difference(arm)
            half = f"{PM} {d['half_width']:.4f}" if d["half_width"] == d["half_width"] else DASH
            row += [_signed(d["difference"]), Cell(half), _p(d["p_adjusted"])]
        rows.append(row)
    header = ["Model", *(key.rpartition(".")[2] for key in keys), "Params", "Loss", "RWKV/Mamba Ratio"]
    return Table([*header, "Difference", "95%", "p (adjusted)"], rows)


def _number(value: float, digits: int) -> Cell:
    return Cell(DASH) if value != value or math.isinf(value) else Cell(f"{value:,.{digits}f}", float(value))


def _signed(value: float) -> Cell:
    return Cell(DASH) if value != value else Cell(signed(value), float(value))


def _p(p: float) -> Cell:
    return Cell(DASH) if p != p else Cell(p_words(p).removeprefix("p = ").removeprefix("p "), float(p))
