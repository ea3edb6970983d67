"""What the branches do, in sentences. A branch is said to matter only where its interval and its control allow it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.diagnosis.necessity import Cost, Interval, compare_branches, costs
from analysis.diagnosis.records import ALL_LAYERS, FULL, Diagnoses
from analysis.words import PM, signed

_NAMES = {"rwkv": "RWKV", "mamba": "Mamba", "attention": "attention", "fusion": "the fusion"}
_DONE = {"mean": "replaced by its mean", "shuffle": "shuffled over the batch"}
_LEAST, _NOTHING = 5e-4, 5e-6  # nats: smaller ones are written with five digits instead of three, the smallest as 0.000


@dataclass(frozen=True)
class BranchSentence:
    """One arm's sentence. ``kind``: both, one, none (shown to matter), single (there is one branch only)."""

    arm: str
    kind: str
    text: str


def branch_name(branch: str) -> str:
    """``RWKV``, ``Mamba``, ``RWKV a`` (of twins); unknown names as they are."""
    stem, _, twin = branch.partition("_")
    return f"{_NAMES[stem]} {twin}".strip() if stem in _NAMES and len(twin) <= 1 else branch


def path_name(path: str) -> str:
    """What a change of one token goes through: a branch, or everything."""
    return "everything" if path == FULL else branch_name(path)


def nats(value: float) -> str:
    """``0.412``; with more digits where three would show nothing; a true minus sign."""
    return signed(value, _digits(value)).removeprefix("+")


def interval_words(interval: Interval) -> str:
    """``0.412 +- 0.030``, without the half width where there is none."""
    if interval.half != interval.half:
        return nats(interval.mean)
    digits = _digits(max(abs(interval.mean), interval.half))
    return f"{signed(interval.mean, digits).removeprefix('+')} {PM} {interval.half:.{digits}f}"


def _digits(value: float) -> int:
    return 5 if _NOTHING <= abs(value) < _LEAST else 3


def sentences(found: Diagnoses, arms: list[str]) -> list[BranchSentence]:
    """A sentence per diagnosed arm, in the order of ``arms``; arms without the disturbance of all layers have none."""
    necessity = found["necessity"]
    everywhere = costs(necessity[necessity["layer"] == ALL_LAYERS])
    told = [_sentence(found, everywhere, arm) for arm in arms if arm in found.arms]
    return [sentence for sentence in told if sentence]


def _sentence(found: Diagnoses, everywhere: dict, arm: str) -> BranchSentence | None:
    by_branch = {b: everywhere.get((arm, ALL_LAYERS, b, "zero")) for b in found.branches(arm)}
    known = {branch: cost for branch, cost in by_branch.items() if cost and cost.increase.mean == cost.increase.mean}
    if not known:
        return None
    ordered = sorted(known, key=lambda branch: -known[branch].increase.mean)
    parts = [
        f"{branch_name(branch)}{'' if i else ' off everywhere costs'} {interval_words(known[branch].increase)}"
        f"{'' if i else ' nats'} "
        f"({_control_words(known[branch])})"
        for i, branch in enumerate(ordered)
    ]
    seeds = max(cost.increase.seeds for cost in known.values())
    basis = f"{seeds} seeds" if seeds > 1 else f"one seed: {PM} is over validation windows, and holds for that model"
    text = f"switching {', '.join(parts)} ({basis}). "
    shown = [branch for branch in ordered if known[branch].shown]
    if len(known) == 1:
        (branch,) = known
        words = "It is the only branch." if known[branch].shown else f"{_why_not(branch, known[branch])}."
        return BranchSentence(arm, "single", text + words)
    kind = "both" if len(shown) == len(known) else "one" if shown else "none"
    text += _conclusion(found["necessity"], arm, ordered, shown, known)
    return BranchSentence(arm, kind, " ".join([text, *_other_interventions(found, everywhere, arm, ordered, shown)]))


def _control_words(cost: Cost) -> str:
    if cost.control.mean != cost.control.mean:
        return "no control recorded"
    return f"control {interval_words(cost.control)}"


def _conclusion(necessity: pd.DataFrame, arm: str, ordered: list[str], shown: list[str], known: dict[str, Cost]) -> str:
    if not shown:
        if all(_only_here(known[branch]) for branch in ordered):
            models = known[ordered[0]].increase.seeds
            return (
                f"None is shown to matter over seeds, though each does in every one of the {models} models, by their "
                "validation windows."
            )
        reasons = "; ".join(_why_not(branch, known[branch]) for branch in ordered)
        over = " over seeds" if any(_only_here(known[branch]) for branch in ordered) else ""
        return f"{'Neither' if len(ordered) == 2 else 'None'} is shown to matter{over}: {reasons}."
    if len(shown) < len(ordered):
        missing = "; ".join(_why_not(branch, known[branch]) for branch in ordered if branch not in shown)
        return f"{' and '.join(map(branch_name, shown))} {'is' if len(shown) == 1 else 'are'} needed; {missing}."
    text = "Both are needed" if len(ordered) == 2 else "All are needed"
    if len(ordered) != 2:
        return f"{text}."
    more = compare_branches(necessity, arm, *ordered, "zero")
    if more.positive:
        return f"{text}, {branch_name(ordered[0])} more (by {interval_words(more)})."
    return f"{text}; that one matters more than the other is not shown ({interval_words(more)})."


def _only_here(cost: Cost) -> bool:
    """Whether every diagnosed model needs the branch, but the seeds do not show it in general."""
    return cost.in_every_run and not cost.shown and cost.increase.seeds > 1


def _why_not(branch: str, cost: Cost) -> str:
    """Why a branch is not shown to matter."""
    name = branch_name(branch)
    if _only_here(cost):
        return (
            f"{name} matters in each of the {cost.increase.seeds} models, by their validation windows, but too "
            "unevenly to say so of other seeds"
        )
    if cost.increase.half != cost.increase.half:
        return f"{name} is not shown to matter (no uncertainty recorded)"
    if cost.increase.negative:
        return f"{name} is not shown to matter (the loss falls without it)"
    if not cost.increase.positive:
        return f"{name} is not shown to matter (the interval includes zero)"
    if cost.control.mean != cost.control.mean:
        return f"{name} is not shown to matter (there is no control to hold it against)"
    return f"{name} is not shown to matter (no more than as long a move in random directions)"


def _other_interventions(
    found: Diagnoses, everywhere: dict, arm: str, ordered: list[str], shown: list[str]
) -> list[str]:
    """Where replacing by the mean or shuffling says something else than zeroing does."""
    said = []
    for intervention, words in _DONE.items():
        own = {b: everywhere.get((arm, ALL_LAYERS, b, intervention)) for b in ordered}
        own = {branch: cost for branch, cost in own.items() if cost}
        for branch, cost in own.items():
            name = branch_name(branch)
            if cost.shown and branch not in shown:
                said.append(f"But {words}, {name} costs {interval_words(cost.increase)}, more than its control.")
            elif branch in shown and not cost.shown:
                said.append(f"But {words}, {name} costs {interval_words(cost.increase)}: not shown to matter.")
        if len(own) == len(ordered) == 2 and len(shown) == 2:
            turned = compare_branches(found["necessity"], arm, ordered[1], ordered[0], intervention)
            if turned.positive:
                said.append(f"But {words}, {branch_name(ordered[1])} costs more (by {interval_words(turned)}).")
    return said


def _weights(about: pd.DataFrame) -> list[str]:
    """The best weights of a run that overfits are not those of its final loss."""
    if about["checkpoint"].nunique() != 1 or about["step"].isna().any():
        return []
    first, last = int(about["step"].min()), int(about["step"].max())
    steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    return [f"Measured on the {about['checkpoint'].iloc[0]} weights, of {steps}."]


def remarks(found: Diagnoses, runs_per_arm: dict[str, int], arms: list[str]) -> list[str]:
    """What to know before comparing the arms: which weights and runs are diagnosed, and what was not made alike."""
    about, said = found["about"], _weights(found["about"])
    counts = {arm: (int((about["arm"] == arm).sum()), runs_per_arm[arm]) for arm in arms if arm in found.arms}
    few = {arm: f"{count} of {runs} runs" for arm, (count, runs) in counts.items() if count < runs}
    if len(few) == len(counts) > 1 and len(set(few.values())) == 1:
        said.append(f"Of every arm, {next(iter(few.values()))} are diagnosed.")
    else:
        said += [f"{arm}: {words} diagnosed." for arm, words in few.items()]
    without = [arm for arm in arms if arm not in found.arms]
    if without:
        listed = ", ".join(without) if len(without) <= 6 else f"{len(without)} arms"
        said.append(f"Not diagnosed: {listed}.")
    for column, what in (
        ("checkpoint", "checkpoints"),
        ("tokens", "numbers of validation tokens"),
        ("dtype", "number formats"),
        ("code_version", "code versions"),
    ):
        values = about[column].value_counts()
        if len(values) > 1:
            named = (f"{value:,.0f}" if isinstance(value, float) else str(value) for value in values.index[:4])
            counted = ", ".join(f"{name} ({count} runs)" for name, count in zip(named, values, strict=False))
            said.append(f"Diagnosed with different {what}, so compare with care: {counted}.")
    return said
