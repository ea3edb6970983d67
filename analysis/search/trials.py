"""Read what a search left behind: ``search.json`` (or ``search-ARM.json`` where every arm has a study of its own).

Like ``analysis.records``, only the standard library, and nothing in a file can raise an error.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.records.json_files import load_object, number, whole
from analysis.records.plans import name_of

SEARCH_SCHEMA = "groundthink.search/1"
SEARCH_FILE = re.compile(r"^search(-.+)?\.json$")
COMPLETE, PRUNED, FAIL = "COMPLETE", "PRUNED", "FAIL"
STATES = (COMPLETE, PRUNED, FAIL, "RUNNING", "WAITING")
EDGE = 0.05  # a value this close to an end of its range (as a share of it) is at the edge
_TRIAL_FOLDER = re.compile(r"^(.+-)?trial-\d+-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Dimension:
    """One dimension of a search space."""

    name: str
    kind: str  # float, int or categorical
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: dict[str, Any] = field(default_factory=dict)

    def position(self, value: Any) -> float:
        """Where ``value`` lies between the ends of the range, 0 to 1, in the logarithm for a log range; else NaN."""
        value, low, high = number(value), self.low, self.high
        if self.log and low > 0 and value > 0:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low) if high > low else math.nan

    def edge(self, value: Any) -> str | None:
        """``lower`` or ``upper`` where ``value`` is within ``EDGE`` of that end of the range."""
        position = self.position(value)
        return "lower" if position <= EDGE else "upper" if position >= 1 - EDGE else None


@dataclass(frozen=True)
class Trial:
    """One trial. ``values`` has a number per metric for a complete trial, else it is empty."""

    number: int
    state: str
    params: dict[str, Any]
    values: tuple[float, ...]
    intermediate: dict[int, float]  # step -> validation loss, as the pruner was told
    reason: str | None
    folder: str | None  # of its run, relative to the folder of the search
    run_id: str | None
    steps: int | None
    seconds: float
    enqueued: bool  # asked for by hand, not chosen by the sampler

    @property
    def last(self) -> float:
        """The last intermediate value; NaN if there is none."""
        return self.intermediate[max(self.intermediate)] if self.intermediate else math.nan


@dataclass(frozen=True)
class Search:
    """One study and its trials, by number."""

    path: Path  # the folder of the search
    folder: str  # the same, relative to the directory of the report
    study: str
    question: str | None
    arm: str | None
    sampler: str
    pruner: str
    n_trials: int
    fresh_seeds: tuple[int, ...]  # that had no part in it; none in an older record
    metrics: tuple[str, ...]
    directions: tuple[str, ...]  # minimize or maximize
    space: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    importance: dict[str, dict[str, float]]  # metric -> dimension -> share
    importance_method: str
    steps_run: int | None  # of the complete and the pruned trials
    steps_without_pruning: int | None

    def of_state(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]

    @property
    def counts(self) -> Counter[str]:
        return Counter(trial.state for trial in self.trials)

    @property
    def finished(self) -> bool:
        return len(self.of_state(COMPLETE, PRUNED, FAIL)) >= self.n_trials

    def cost(self, trial: Trial) -> tuple[float, ...]:
        """The values of a trial with the sign that makes lower better."""
        return tuple(v if d == "minimize" else -v for v, d in zip(trial.values, self.directions, strict=True))

    def ranked(self) -> list[Trial]:
        """The complete trials, best first: by the metric, or with several by how many trials beat them in all."""
        complete = self.of_state(COMPLETE)
        if len(self.metrics) == 1:
            return sorted(complete, key=lambda trial: (self.cost(trial), trial.number))
        return sorted(complete, key=lambda t: (sum(self._beats(o, t) for o in complete), self.cost(t), t.number))

    def best(self) -> list[Trial]:
        """The best complete trial; with several metrics all that no other beats (the Pareto front)."""
        ranked = self.ranked()
        if len(self.metrics) == 1:
            return ranked[:1]
        return [trial for trial in ranked if not any(self._beats(other, trial) for other in ranked)]

    def _beats(self, a: Trial, b: Trial) -> bool:
        pairs = list(zip(self.cost(a), self.cost(b), strict=True))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def is_trial_folder(path: Path, search_folders: set[Path]) -> bool:
    """Whether a run folder belongs to a search, by its place and name (its record may not be there yet)."""
    return path.parent in search_folders and bool(_TRIAL_FOLDER.match(path.name))


def read_search(file: Path, directory: Path) -> Search | str:
    """The search in a file, or a sentence that says why it cannot be used."""
    folder = name_of(file.parent, directory)
    content = load_object(file)
    if isinstance(content, str):
        return f"{folder}: {content}; the search is not reported"
    schema = content.get("schema")
    if schema != SEARCH_SCHEMA:
        return f"{folder}: {file.name} has the schema {str(schema)[:60]!r}; the search is not reported"
    metrics, directions = _texts(content.get("metrics")), _texts(content.get("directions"))
    if not metrics or len(metrics) != len(directions) or not set(directions) <= {"minimize", "maximize"}:
        return f"{folder}: {file.name} has no usable metrics and directions; the search is not reported"

    listed = content.get("trials")
    trials = (
        [_trial(item, len(metrics)) for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    )
    by_number = {trial.number: trial for trial in trials if trial is not None}
    space, steps, importance = content.get("space"), _dict(content.get("steps")), _dict(content.get("importance"))
    return Search(
        path=file.parent,
        folder=folder,
        study=str(content.get("study_name") or content.get("sweep") or file.parent.name),
        question=_text(content.get("question")),
        arm=_text(content.get("arm")),
        sampler=str(content.get("sampler") or "not recorded"),
        pruner=str(content.get("pruner") or "not recorded"),
        n_trials=whole(content.get("n_trials")) or len(by_number),
        fresh_seeds=tuple(_whole_numbers(content.get("fresh_seeds"))),
        metrics=metrics,
        directions=directions,
        space=tuple(_dimension(name, spec) for name, spec in _dict(space).items() if isinstance(spec, dict)),
        trials=tuple(by_number[i] for i in sorted(by_number)),
        importance={metric: _numbers(shares) for metric, shares in importance.items() if metric in metrics},
        importance_method=str(content.get("importance_method") or "not recorded"),
        steps_run=whole(steps.get("run")),
        steps_without_pruning=whole(steps.get("without_pruning")),
    )


def _trial(item: dict[str, Any], metrics: int) -> Trial | None:
    """A trial; a complete one without a number for every metric counts as failed. None without a number or state."""
    place, state = whole(item.get("number")), item.get("state")
    if place is None or state not in STATES:
        return None
    given = item.get("values") if isinstance(item.get("values"), list) else []
    values = tuple(number(value) for value in given)
    reason = _text(item.get("reason"))
    usable = len(values) == metrics and all(map(math.isfinite, values))
    if state == COMPLETE and not usable:
        state, reason = FAIL, reason or "complete, but without a finite value"
    passed = {whole(_to_number(step)): number(v) for step, v in _dict(item.get("intermediate")).items()}
    return Trial(
        number=place,
        state=state,
        params=_dict(item.get("params")),
        values=values if state == COMPLETE else (),
        intermediate={step: v for step, v in passed.items() if step is not None and math.isfinite(v)},
        reason=reason,
        folder=_text(item.get("folder")),
        run_id=_text(item.get("run_id")),
        steps=whole(item.get("steps")),
        seconds=number(item.get("seconds")),
        enqueued=item.get("enqueued") is True,
    )


def _dimension(name: str, spec: dict[str, Any]) -> Dimension:
    choices = tuple(spec["choices"]) if isinstance(spec.get("choices"), list) else ()
    kind = str(spec.get("type"))
    ends = number(spec.get("low")), number(spec.get("high"))
    return Dimension(name, kind, *ends, spec.get("log") is True, choices, _dict(spec.get("when")))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    return {key: number(v) for key, v in _dict(value).items() if math.isfinite(number(v))}


def _whole_numbers(value: Any) -> list[int]:
    return [x for x in map(whole, value) if x is not None] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else ()


def _to_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
