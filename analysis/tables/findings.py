"""Tables of what ``analysis.findings`` found, in words; their raw numbers go to CSV files."""

from __future__ import annotations

from analysis.comparison.compare import Comparison
from analysis.comparison.findings import Findings
from analysis.comparison.settings import LEARNING_RATE
from analysis.tables.table import DASH, Cell, Table, interval_cell, number_cell, p_cell, signed_cell, spread_cell
from analysis.words import PM

MOST_RATES = 12
_LEAST_SHARE = 0.001


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


def factorial_tables(findings: Findings) -> dict[str, Table]:
    """``factorial_terms``, ``factorial_effects`` and ``factorial_cells``; empty without a factorial sweep."""
    found = findings.factorial
    if found is None:
        return {}
    terms = [
        [
            Cell(row["term"], i),
            Cell(f"{row['df']}, {row['df_residual']}", row["df"]),
            number_cell(row["f"], 2),
            p_cell(row["p"]),
            number_cell(row["partial_eta2"], 3),
        ]
        for i, row in enumerate(found.terms.to_dict("records"))
    ]
    named = {factor.name: factor for factor in found.factors}
    effects = [
        [
            Cell(named[row["factor"]].label(row["level"]), i),
            Cell(named[row["factor"]].label(row["against"])),
            signed_cell(row["difference"]),
            interval_cell(row["low"], row["high"]),
            p_cell(row["p"]),
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
        cells = [_rate_cell(by_rate[rate]) if rate in by_rate else Cell(DASH) for rate in rates]
        edge = " (edge of the range)" if best["edge"] else ""
        rows.append([Cell(str(group), i), *cells, Cell(f"{best['lr']:g}{edge}", best["lr"])])
    tables = {"learning_rates": Table(["Model", *(f"lr {rate:g}" for rate in rates), "Best lr"], rows)}
    if len(found.differences):
        body = [
            [
                Cell(row["arm"], i),
                Cell(row["at"]),
                Cell(str(row["pairs"]), row["pairs"]),
                signed_cell(row["difference"]),
                interval_cell(row["low"], row["high"]),
                p_cell(row["p_adjusted"]),
            ]
            for i, row in enumerate(found.differences.to_dict("records"))
        ]
        header = ["Model", "Learning rate", "Pairs", "Difference", "95% interval", "p (adjusted)"]
        tables["learning_rate_differences"] = Table(header, body)
    return tables


def _rate_cell(row: dict) -> Cell:
    return spread_cell(row["mean"], row["sd"], 4, " *" if row["best"] else "")


def rank_table(findings: Findings, arms: list[str]) -> dict[str, Table]:
    """``ranks``: how often an arm comes first when the seeds are drawn anew; arms that hardly ever do are left out."""
    shares = findings.first_places
    if shares is None:
        return {}
    listed = [arm for arm in arms if arm in shares and shares[arm] >= _LEAST_SHARE]
    rows = [[Cell(arm, i), Cell(f"{shares[arm]:.1%}", shares[arm])] for i, arm in enumerate(listed)]
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
    if len(fusions) > 2 and LEARNING_RATE not in keys:
        tables["fusion"] = _phase_table(comparison, settings, keys)
    elif {"fusion.gate_init", "fusion.gain_init", "gate_init", "model.pattern"} & set(keys):
        tables["ratio"] = _phase_table(comparison, settings, keys)
    return tables


def _phase_table(comparison: Comparison, settings: dict[str, dict[str, str]], keys: list[str]) -> Table:
    groups = comparison.runs.groupby("arm")
    means, sds = groups[comparison.metric].mean(), groups[comparison.metric].std(ddof=1)
    ratios, params = groups["grad_ratio"].mean(), groups["params_total"].mean()
    rows = []
    for i, arm in enumerate(arm for arm in comparison.arms if arm in settings):
        cells = [Cell(settings[arm].get(key, DASH)) for key in keys]
        loss = spread_cell(means[arm], sds[arm], 4)
        row = [Cell(arm, i), *cells, number_cell(params[arm], 0), loss, number_cell(ratios[arm], 3)]
        if arm == comparison.baseline.arm:
            row += [Cell("baseline", 0.0), Cell(DASH), Cell(DASH)]
        else:
            d = comparison.difference(arm)
            half = f"{PM} {d['half_width']:.4f}" if d["half_width"] == d["half_width"] else DASH
            row += [signed_cell(d["difference"]), Cell(half), p_cell(d["p_adjusted"])]
        rows.append(row)
    header = ["Model", *(key.rpartition(".")[2] for key in keys), "Params", "Loss", "RWKV/Mamba Ratio"]
    return Table([*header, "Difference", "95%", "p (adjusted)"], rows)
