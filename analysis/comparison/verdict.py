"""The answer in words. An arm is called better or worse only where a corrected test says so."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from analysis.comparison.cautions import cautions, names, tested_rows, to_come, unlike_speeds
from analysis.comparison.compare import Comparison
from analysis.comparison.flags import matches
from analysis.statistics.differences import NO_TEST, PAIRED, UNPAIRED, Method
from analysis.statistics.inference import ALPHA
from analysis.statistics.resampling import TRUSTED_FROM
from analysis.words import METRIC_WORDS, PM, p_number, p_words, signed

SOURCE_WORDS = {
    "given": "the baseline asked for",
    "sweep": "the baseline that the sweep names",
    "best_mean": "the arm with the lowest mean, chosen after looking because no baseline was named",
}
MOST_SIZES = 3  # arms whose difference stands in the headline
MOST_NEEDED = 500  # seeds; more is no advice
FEW_SENTENCES = 8  # so many arms are all told of
MOST_SENTENCES = 16
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
    remarks: list[str]  # how it was compared
    cautions: list[str] = field(default_factory=list)  # what to know before believing it; also in the terminal

    @property
    def told(self) -> list[Sentence]:
        """The sentences that a report opens with: all of a few, of many arms those that say more than "not shown"."""
        some = self.sentences
        if len(some) > FEW_SENTENCES:
            some = [sentence for sentence in some if sentence.kind != NONE]
        return some[:MOST_SENTENCES]


def verdict(comparison: Comparison) -> Verdict:
    """The headline, one sentence per arm (best mean first) and remarks that hold for all of them."""
    baseline, runs = comparison.baseline, comparison.runs
    lost = comparison.without_runs
    unusable = f" No usable run of {names(lost)}." if lost else ""
    if len(comparison.arms) == 1:
        values = runs[comparison.metric]
        mean = f"{METRIC_WORDS[comparison.metric]} {values.mean():.4f} nats per token"
        spread = (
            f" (sd {values.std():.4f} over {len(values)} seeds)" if len(values) > 1 else " (one seed, spread unknown)"
        )
        return Verdict(
            f"One arm only, {baseline.arm}: {mean}{spread}. There is nothing to compare it with.{unusable}",
            [],
            [],
            [*to_come(comparison), *unlike_speeds(comparison)],
        )

    others = [arm for arm in comparison.arms if arm != baseline.arm]
    sentences = [_sentence(comparison, arm) for arm in others]
    return Verdict(
        _headline(comparison, sentences) + unusable,
        sentences,
        _remarks(comparison),
        cautions(comparison, [s.arm for s in sentences if s.kind in (BETTER, WORSE, NONE)]),
    )


def _headline(comparison: Comparison, sentences: list[Sentence]) -> str:
    kinds = (BETTER, WORSE, NONE, UNTESTED, INCOMPARABLE)
    named = {kind: [s.arm for s in sentences if s.kind == kind] for kind in kinds}
    baseline = comparison.baseline.arm
    parts = []
    if named[BETTER]:
        parts.append(_shown_words(comparison, named[BETTER], "beats", "beat"))
    if named[WORSE]:
        parts.append(_shown_words(comparison, named[WORSE], "is worse than", "are worse than"))
    if named[NONE]:
        could = _could_show(comparison, named[NONE])
        rest = "the other " if parts else "either of the " if len(named[NONE]) == 2 else "any of the "
        if len(named[NONE]) == 1:
            parts.append(f"no difference shown between {named[NONE][0]} and {baseline}{could}")
        else:
            parts.append(f"no difference shown between {baseline} and {rest}{len(named[NONE])} arms tested{could}")
    if named[UNTESTED]:
        count = len(named[UNTESTED])
        parts.append(
            f"{names(named[UNTESTED])} {_is(named[UNTESTED])} not tested: at least two shared seeds are needed"
        )
        if count == len(sentences):
            parts = [
                f"Nothing can be shown: no arm shares two seeds with {baseline}, and one seed gives no uncertainty"
            ]
    if named[INCOMPARABLE]:
        parts.append(f"{names(named[INCOMPARABLE])} cannot be compared (other data or tokenizer)")
    text = "; ".join(parts)
    return f"{text.replace('no difference', 'No difference', 1) if text.startswith('no difference') else text}."


def _shown_words(comparison: Comparison, arms: list[str], verb: str, verbs: str) -> str:
    """``gated beats gain by 0.0210 ± 0.0060 nats (5 paired seeds, adjusted p = 0.004)``; of many arms the names."""
    baseline = comparison.baseline.arm
    if len(arms) > MOST_SIZES:
        return f"{names(arms)} {verbs} {baseline}"
    rows = [comparison.difference(arm) for arm in arms]
    sizes = [f"{abs(row['difference']):.4f} {PM} {row['half_width']:.4f}" for row in rows]
    if len(arms) == 1:
        return f"{arms[0]} {verb} {baseline} by {sizes[0]} nats ({_evidence(rows[0])})"
    pairs = {(row["test"], int(row["pairs"])) for row in rows}
    seeds = f"{_seeds(rows[0])}, " if len(pairs) == 1 else ""
    largest = p_number(max(row["p_adjusted"] for row in rows))
    p = f"p {largest}" if largest.startswith("<") else f"p at most {largest}"
    return f"{names(arms)} {verbs} {baseline} by {names(sizes)} nats ({seeds}adjusted {p})"


def _evidence(row: dict[str, Any]) -> str:
    return f"{_seeds(row)}, adjusted {p_words(row['p_adjusted'])}"


def _seeds(row: dict[str, Any]) -> str:
    return "unpaired seeds" if row["test"] == UNPAIRED else f"{int(row['pairs'])} paired seeds"


def _could_show(comparison: Comparison, arms: list[str]) -> str:
    """The difference that the seeds show with a chance of 80%: one, or the range over several arms."""
    rows = [comparison.difference(arm) for arm in arms]
    found = [row["smallest_detectable"] for row in rows if row["smallest_detectable"] == row["smallest_detectable"]]
    pairs = {int(row["pairs"]) for row in rows}
    if not found:
        return ""
    seeds = f"these {pairs.pop()} seeds" if len(pairs) == 1 else "these seeds"
    low, high = f"{min(found):.4f}", f"{max(found):.4f}"
    about = f"about {high}" if low == high else f"{low} to {high}, depending on the arm,"
    return f" ({seeds} would show a difference of {about} in four of five sweeps)"


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
    unmatched = [f.text for f in comparison.flags_of(arm) if f.kind not in ("seeds", "lost", "lr", "gate", "together")]
    if unmatched:
        text += f" Not matched: {'; '.join(unmatched)}."
        if kind in (BETTER, WORSE):
            text += " The difference may come from that."
    cautions = [f.text for f in comparison.flags_of(arm) if f.kind in ("lr", "gate")]
    if cautions:
        text += f" Caution: {'; '.join(cautions)}."
    return Sentence(arm, kind, text)


def _finding(row: dict[str, Any], arm: str, baseline: str) -> tuple[str, str]:
    n, mean = int(row["pairs"]), row["difference"]
    if row["test"] == NO_TEST and n == 0:
        return UNTESTED, f"shares no seed with {baseline}, so there is no paired comparison."
    if row["test"] == NO_TEST:
        return UNTESTED, f"{_apart(mean, baseline)} in the one shared seed; no interval, so nothing is shown."
    if math.isnan(row["p"]):
        if mean == 0:
            return NONE, f"exactly the same loss as {baseline} in all {n} pairs."
        return (
            UNTESTED,
            f"{_apart(mean, baseline)}, the same in all {n} pairs, which leaves no spread to test it against.",
        )

    half = f"{PM} {row['half_width']:.4f} nats"
    unpaired = " Compared without pairs (Welch), as the two share no two seeds." if row["test"] == UNPAIRED else ""
    if row["shown"]:
        kind = BETTER if mean < 0 else WORSE
        return kind, f"{kind} than {baseline} by {abs(mean):.4f} {half} ({_evidence(row)}).{unpaired}"
    text = f"no difference shown from {baseline}: {signed(mean)} {half} ({_evidence(row)}).{unpaired}"
    if row["low"] > 0 or row["high"] < 0:
        text += f" Alone it would count; after correcting for {row['family']} comparisons it does not."
    needed = row["seeds_needed"]
    if 2 < n < needed <= MOST_NEEDED:  # two seeds say next to nothing about the spread
        text += f" About {needed:.0f} seeds would resolve it."
    return NONE, text


def _apart(mean: float, baseline: str) -> str:
    if mean == 0:
        return f"the same loss as {baseline}"
    return f"{abs(mean):.4f} nats per token {'below' if mean < 0 else 'above'} {baseline}"


def _remarks(comparison: Comparison) -> list[str]:
    baseline, tested = comparison.baseline, tested_rows(comparison)
    remarks = [f"Baseline: {baseline.arm}, {SOURCE_WORDS[baseline.source]}."]
    if baseline.note:
        remarks.append(baseline.note)
    same = [match.what.lower() for match in matches(comparison.runs, baseline.arm) if match.same]
    remarks.append(f"Matched between the arms: {', '.join(same) or 'nothing'}.")
    method = comparison.methods[comparison.metric]
    if method.family:
        remarks.append(
            f"Differences are in {METRIC_WORDS[comparison.metric]}, arm minus baseline by seed; lower is better. "
            f"{PM} is half of a 95% t interval of that one comparison. {method_words(method)}"
        )
    few = tested.loc[(tested["test"] == PAIRED) & (tested["p_sign_flip_smallest"] > ALPHA), "pairs"]
    if len(few):
        n = int(few.max())
        remarks.append(
            f"Sign-flip p, in the table of differences, assumes no normal distribution, but {n} pairs cannot bring it "
            f"below {2 / 2**n:.4g}. Bootstrap intervals, in differences.csv, are too short below {TRUSTED_FROM} pairs."
        )
    return remarks


def method_words(method: Method) -> str:
    """How p were adjusted, in a sentence or two."""
    count = f"{method.family} comparison{'s' if method.family > 1 else ''}"
    if method.name == "bonferroni":
        return f"p is Welch's, times {method.family} (Bonferroni)."
    if method.name == "holm":
        why = "With two seeds nothing vouches for a residual pooled over the arms"
        if method.check_level < 1:
            why = (
                "The baseline's loss may vary more between seeds than that of the other arms "
                f"(p = {method.p_spread:.2g}; doubted below {method.check_level:g})"
            )
        text = f"{why}, so the residual is not pooled: p is that of paired t tests with Holm's correction for {count}."
    else:
        name = "Dunnett's" if method.name == "dunnett" else "Tukey's"
        why = ", all pairs of arms, since the baseline was chosen by its result" if method.name == "tukey" else ""
        name = name if method.exact else "Bonferroni's bound (the design is too large and incomplete for Tukey's)"
        text = (
            f"p is {name} for {count}{why}, on the residual of all arms and seeds together ({method.df} degrees of "
            f"freedom, residual sd {method.residual_sd:.4f}), and never below that of the pair's own t test: a "
            "difference counts only if both are below 0.05."
        )
    if method.unpaired:
        text += f" {method.unpaired} of the comparisons are unpaired (Welch, Bonferroni)."
    return text
