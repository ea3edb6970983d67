"""The answer in words. An arm is called better or worse only where a corrected test says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from analysis.compare import Comparison

METRIC_WORDS = {"best_val_loss": "best validation loss", "final_val_loss": "final validation loss"}
SOURCE_WORDS = {
    "given": "the baseline asked for",
    "sweep": "the baseline that the sweep names",
    "best_mean": "the arm with the lowest mean, chosen after looking because no baseline was named",
}
BETTER, WORSE, NONE, UNTESTED, INCOMPARABLE = "better", "worse", "none", "untested", "incomparable"


@dataclass(frozen=True)
class Sentence:
    """One arm's verdict: ``kind`` is one of the five words above, for colours and counts."""

    arm: str
    kind: str
    text: str


@dataclass(frozen=True)
class Verdict:
    headline: str
    sentences: list[Sentence]
    remarks: list[str]


def signed(value: float, digits: int = 4) -> str:
    """``+0.0123``, with a true minus sign, and without one for what is 0 in that many digits."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def p_words(p: float) -> str:
    """``p = 0.012`` or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def verdict(comparison: Comparison) -> Verdict:
    """The headline, one sentence per arm (best mean first) and remarks that hold for all of them."""
    baseline, runs = comparison.baseline, comparison.runs
    lost = comparison.without_runs
    unusable = f" No usable run of {_names(lost)}." if lost else ""
    if len(comparison.arms) == 1:
        values = runs[comparison.metric]
        mean = f"{METRIC_WORDS[comparison.metric]} {values.mean():.4f} nats per token"
        spread = (
            f" (sd {values.std():.4f} over {len(values)} seeds)" if len(values) > 1 else " (one seed, spread unknown)"
        )
        return Verdict(
            f"One arm only, {baseline.arm}: {mean}{spread}. There is nothing to compare it with.{unusable}", [], []
        )

    others = [arm for arm in comparison.arms if arm != baseline.arm]
    sentences = [_sentence(comparison, arm) for arm in others]
    return Verdict(_headline(comparison, sentences) + unusable, sentences, _remarks(comparison, sentences))


def _headline(comparison: Comparison, sentences: list[Sentence]) -> str:
    named = {
        kind: [s.arm for s in sentences if s.kind == kind] for kind in (BETTER, WORSE, NONE, UNTESTED, INCOMPARABLE)
    }
    baseline = comparison.baseline.arm
    parts = []
    if named[BETTER]:
        parts.append(f"{_names(named[BETTER])} {_is(named[BETTER])} better than {baseline}")
    if named[WORSE]:
        parts.append(f"{_names(named[WORSE])} {_is(named[WORSE])} worse than {baseline}")
    if named[NONE]:
        rest = "the other " if parts else "either of the " if len(named[NONE]) == 2 else "any of the "
        if len(named[NONE]) == 1:
            parts.append(f"no difference shown between {named[NONE][0]} and {baseline}")
        else:
            parts.append(f"no difference shown between {baseline} and {rest}{len(named[NONE])} arms tested")
    if named[UNTESTED]:
        count = len(named[UNTESTED])
        parts.append(
            f"{_names(named[UNTESTED])} {_is(named[UNTESTED])} not tested: at least two shared seeds are needed"
        )
        if count == len(sentences):
            parts = [
                f"Nothing can be shown: no arm shares two seeds with {baseline}, and one seed gives no uncertainty"
            ]
    if named[INCOMPARABLE]:
        parts.append(f"{_names(named[INCOMPARABLE])} cannot be compared (other data or tokenizer)")
    text = "; ".join(parts)
    return f"{text.replace('no difference', 'No difference', 1) if text.startswith('no difference') else text}."


def _names(arms: list[str]) -> str:
    if len(arms) > 6:
        return f"{len(arms)} arms"
    return arms[0] if len(arms) == 1 else f"{', '.join(arms[:-1])} and {arms[-1]}"


def _is(arms: list[str]) -> str:
    return "is" if len(arms) == 1 else "are"


def _sentence(comparison: Comparison, arm: str) -> Sentence:
    row, baseline = comparison.difference(arm), comparison.baseline.arm
    if not row["comparable"]:
        blocking = [f for f in comparison.flags_of(arm) + comparison.flags_of(baseline) if f.blocking]
        return Sentence(arm, INCOMPARABLE, f"not comparable with {baseline}: {'; '.join(f.text for f in blocking)}.")
    kind, text = _finding(row, arm, baseline)
    lost = [f.text for f in comparison.flags_of(arm) if f.kind == "lost"]
    if lost:
        text += f" Not in these numbers: {'; '.join(lost)}."
    unmatched = [f.text for f in comparison.flags_of(arm) if f.kind not in ("seeds", "lost")]
    if unmatched:
        text += f" Not matched: {'; '.join(unmatched)}."
        if kind in (BETTER, WORSE):
            text += " The difference may come from that."
    return Sentence(arm, kind, text)


def _finding(row: dict[str, Any], arm: str, baseline: str) -> tuple[str, str]:
    n, mean = int(row["pairs"]), row["difference"]
    if n == 0:
        return UNTESTED, f"shares no seed with {baseline}, so there is no paired comparison."
    if n == 1:
        return UNTESTED, f"{_apart(mean, baseline)} in the one shared seed; no interval, so nothing is shown."
    if math.isnan(row["p"]):
        if mean == 0:
            return NONE, f"exactly the same loss as {baseline} in all {n} pairs."
        return (
            UNTESTED,
            f"{_apart(mean, baseline)}, the same in all {n} pairs, which leaves no spread to test it against.",
        )

    interval = f"95% interval {signed(row['low'])} to {signed(row['high'])}"
    details = f"({interval}, {n} paired seeds, adjusted {p_words(row['p_holm'])})"
    if row["shown"]:
        kind = BETTER if mean < 0 else WORSE
        return kind, f"{kind} than {baseline}: {signed(mean)} nats per token {details}."
    text = f"no difference shown from {baseline}: {signed(mean)} nats per token {details}."
    if row["low"] > 0 or row["high"] < 0:
        return (
            NONE,
            f"{text} The interval alone excludes 0; after correcting for {row['family']} comparisons it does not hold.",
        )
    if n == 2:
        width = row["high"] - row["low"]
        return NONE, f"{text} With 2 seeds the interval is {width:.3f} nats wide."
    return NONE, text


def _apart(mean: float, baseline: str) -> str:
    if mean == 0:
        return f"the same loss as {baseline}"
    return f"{abs(mean):.4f} nats per token {'below' if mean < 0 else 'above'} {baseline}"


def _remarks(comparison: Comparison, sentences: list[Sentence]) -> list[str]:
    baseline, tested = (
        comparison.baseline,
        comparison.differences[comparison.differences["metric"] == comparison.metric],
    )
    remarks = [f"Baseline: {baseline.arm}, {SOURCE_WORDS[baseline.source]}."]
    if baseline.note:
        remarks.append(baseline.note)
    family = int(tested["family"].max())
    if family:
        compared = f"{family} comparison{'s' if family > 1 else ''}"
        if baseline.source == "best_mean":
            compared = f"all {family} pairs of arms, since the baseline was chosen by its result"
        remarks.append(
            f"Differences are in {METRIC_WORDS[comparison.metric]}, arm minus baseline by seed; lower is better. "
            f"Intervals are 95% t intervals of one comparison each; p is Holm-adjusted for {compared}."
        )
    pairs = tested.loc[tested["pairs"] > 1, "pairs"]
    if len(pairs) and pairs.min() == 2 and any(s.kind == NONE for s in sentences):
        remarks.append(
            "With 2 seeds a 95% interval reaches 12.7 standard errors to each side: only a difference far larger than "
            "the spread between seeds can be shown. Not shown does not mean equal."
        )
    other = next(metric for metric in METRIC_WORDS if metric != comparison.metric)
    changed = [
        s.arm for s in sentences if _shown(comparison, s.arm, other) != _shown(comparison, s.arm, comparison.metric)
    ]
    if changed:
        remarks.append(f"By {METRIC_WORDS[other]} the verdict differs for {_names(changed)} (see differences.csv).")
    elif family:
        remarks.append(f"By {METRIC_WORDS[other]} the verdicts are the same.")
    return remarks


def _shown(comparison: Comparison, arm: str, metric: str) -> int:
    row = comparison.difference(arm, metric)
    return (1 if row["difference"] > 0 else -1) if row["shown"] else 0
