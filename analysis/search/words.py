"""The answer of a search in words: what was found, against what, and how little one seed per trial proves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from analysis.search.trials import COMPLETE, FAIL, PRUNED, Search, Trial
from analysis.words import METRIC_WORDS

_WORDS = METRIC_WORDS | {"tokens_per_second": "tokens per second", "peak_memory_bytes": "peak memory in bytes"}


@dataclass(frozen=True)
class Answer:
    """``points`` are (kind, text): kind is found, baseline, edge, evidence or counts."""

    headline: str
    points: list[tuple[str, str]]


def metric_words(metric: str) -> str:
    return _WORDS.get(metric, metric)


def value_words(metric: str, value: float) -> str:
    """A value as its metric is written: losses with four digits, what is large with thousands separators."""
    if math.isnan(value):
        return "\N{EM DASH}"
    return f"{value:.4f}" if metric in METRIC_WORDS or abs(value) < 10 else f"{value:,.0f}"


def param_words(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def params_words(trial: Trial) -> str:
    return ", ".join(f"{key}={param_words(value)}" for key, value in trial.params.items())


def answer(search: Search, shown_as: str) -> Answer:
    """What a report of a search opens with. ``shown_as`` is the folder of the search as a person would type it."""
    best = search.best()
    if not best:
        return Answer(f"No trial of {search.study} is complete yet.", [("counts", _counts(search))])
    several = len(search.metrics) > 1
    if several:
        ranges = [
            f"{metric_words(metric)} {value_words(metric, min(v))} to {value_words(metric, max(v))}"
            for metric, v in ((m, [t.values[i] for t in best]) for i, m in enumerate(search.metrics))
        ]
        count = f"{len(best)} trials stand" if len(best) > 1 else "1 trial stands"
        headline = f"{search.study}: {count} on the Pareto front, with {' and '.join(ranges)}."
    else:
        words = f"{metric_words(search.metrics[0])} {value_words(search.metrics[0], best[0].values[0])}"
        headline = f"{search.study}: the best of {len(search.trials)} trials is trial {best[0].number}, with {words}."
    points = [("found", f"Trial {best[0].number}: {params_words(best[0])}.")] if not several else []
    points += [("baseline", text) for text in _against_baselines(search, best)]
    points += [("edge", text) for text in edges(search, best)]
    points.append(("evidence", _evidence(search, shown_as, several)))
    points.append(("counts", _counts(search)))
    return Answer(headline, points)


def _against_baselines(search: Search, best: list[Trial]) -> list[str]:
    """What was gained over each trial that was asked for by hand."""
    enqueued = [trial for trial in search.trials if trial.enqueued]
    if not enqueued:
        return ["No known configuration was put into the search, so there is nothing to measure the gain against."]
    words = []
    for trial in enqueued[:3]:
        name = f"the known configuration, trial {trial.number} ({params_words(trial)})"
        if trial.state != COMPLETE:
            state = {PRUNED: "was pruned", FAIL: "failed"}.get(trial.state, "has not ended")
            words.append(f"Nothing to compare with: {name}, {state}.")
        elif trial in best:
            others = "No trial beats" if len(search.metrics) > 1 else "No trial was better than"
            words.append(f"{others} {name}.")
        elif len(search.metrics) == 1:
            gain = best[0].values[0] - trial.values[0]
            own = value_words(search.metrics[0], trial.values[0])
            words.append(f"{value_words(search.metrics[0], abs(gain))} better than {name}, which has {own}.")
        else:
            values = zip(search.metrics, trial.values, strict=True)
            listed = " and ".join(f"{metric_words(m)} {value_words(m, v)}" for m, v in values)
            words.append(f"For comparison, {name}: {listed}; at least one trial beats it in all.")
    return words


def edges(search: Search, best: list[Trial]) -> list[str]:
    """A sentence per dimension whose best value lies at an end of its range."""
    found = []
    for dimension in search.space:
        at: dict[str, list[Trial]] = {}
        for trial in best:
            side = dimension.edge(trial.params.get(dimension.name))
            if side and not (side == "lower" and dimension.low == 0):  # no key of a configuration goes below 0
                at.setdefault(side, []).append(trial)
        for side, trials in at.items():
            end = dimension.low if side == "lower" else dimension.high
            value = param_words(trials[0].params[dimension.name])
            whose = "The best value" if len(best) == 1 else f"Of {len(trials)} of the {len(best)} best, the value"
            name = f"{whose} of {dimension.name}" + (f", {value}," if len(best) == 1 else "")
            text = f"{name} is at the {side} end of its range ({end:g}): the optimum may lie outside; widen it."
            found.append(text)
    return found


def _evidence(search: Search, shown_as: str, several: bool) -> str:
    text = "Every trial ran with one seed, and the best of many looks better than it is: this is no evidence yet."
    name = f"best-{search.arm}" if search.arm else "best"
    file = f"{name}.yaml"
    if (search.path / file).exists():
        seeds = ",".join(map(str, search.fresh_seeds)) or "..."
        command = f"python -m hybrid.train -m --config-dir {shown_as} --config-name {name} 'sweep.seeds=[{seeds}]'"
        return f"{text} To confirm it, run {file} over other seeds beside the known configuration: {command}"
    which = "the chosen trial" if several else "the best trial"
    return f"{text} To confirm it, run {which} and the known configuration over other seeds."


def _counts(search: Search) -> str:
    counts = search.counts
    left = search.n_trials - counts[COMPLETE] - counts[PRUNED] - counts[FAIL]
    words = [f"{counts[COMPLETE]} complete", f"{counts[PRUNED]} pruned", f"{counts[FAIL]} failed"]
    words += [f"{left} not ended"] if left > 0 else []
    text = f"{', '.join(words)} of {search.n_trials} trials ({search.sampler}, {search.pruner})."
    run, whole = search.steps_run, search.steps_without_pruning
    if run is not None and whole and run < whole:
        text += f" Pruning saved {1 - run / whole:.0%} of the steps ({run:,} instead of {whole:,})."
    return text
