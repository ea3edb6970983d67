"""What was found beyond arm against baseline, in sentences."""

from __future__ import annotations

import math

import pandas as pd

from analysis.comparison.findings import Findings
from analysis.comparison.learning_rates import OPTIMISTIC
from analysis.statistics.factorial import Factorial
from analysis.statistics.ranks import SETTLED
from analysis.words import PM, p_words


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
        said.append(f"Drawing the {findings.blocks_ranked} seeds anew (bootstrap), the lowest mean is of {listed}.")
    settled = findings.settling
    if settled and len(settled.taus):
        last = settled.taus.index[-1]
        if settled.settled is None or settled.settled == last:
            said.append("The arms' ranking was still changing before the last evaluation.")
        else:
            said.append(
                f"From step {settled.settled:,.0f} of {last:,.0f} on, the arms rank as at the end (Kendall's tau from "
                f"{SETTLED})."
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


def factorial_words(found: Factorial, digits: int = 4) -> list[str]:
    """What the factors do, a sentence per main effect and one per interaction.

    e.g. ``branch_norm=rms costs 0.0120 ± 0.0040 nats against branch_norm=none, averaged over fusion (p = 0.01).``
    """
    sentences = []
    p = dict(zip(found.terms["term"], found.terms["p"], strict=True))
    for factor in found.factors:
        others = " and ".join(other.name for other in found.factors if other is not factor)
        effects = found.effects[found.effects["factor"] == factor.name].to_dict("records")
        if len(effects) == 1:
            (row,) = effects
            size = f"{abs(row['difference']):.{digits}f} \N{PLUS-MINUS SIGN} {row['half_width']:.{digits}f} nats"
            name, against = factor.label(row["level"]), factor.label(row["against"])
            if row["p"] < 0.05:
                verb = "costs" if row["difference"] > 0 else "saves"
                text = f"{name} {verb} {size} against {against}, averaged over {others} ({_p(row['p'])})"
            else:
                text = f"no effect of {factor.name} shown, averaged over {others}: {name} minus {against} is "
                text += f"{row['difference']:+.{digits}f} {PM} {row['half_width']:.{digits}f} nats ({_p(row['p'])})"
        else:
            plural = factor.joint
            matters, has = ("matter", "have") if plural else ("matters", "has")
            shown = matters if p[factor.name] < 0.05 else f"{has} no effect shown"
            text = f"{factor.name} {shown}, averaged over {others} ({_p(p[factor.name])})"
        sentences.append(f"{text}.".replace("-0.", "\N{MINUS SIGN}0."))
    for term, value in p.items():
        if " x " in term and value < 0.05:
            sentences.append(
                f"{term} interact ({_p(value)}): what one does depends on the other, so the averages above hide "
                "something; read the means of the combinations."
            )
        elif " x " in term:
            sentences.append(f"No interaction shown: {term} ({_p(value)}).")
    return sentences


def _p(p: float) -> str:
    return "no spread to test against" if p != p else p_words(p)
