"""What was matched between the arms of a comparison, and what was not.

A comparison of two arms says something about what their names say only if everything else is the same.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.comparison.settings import configured
from analysis.health.gates import stopped_by
from analysis.records.runs import Records, Run, Seeds
from analysis.records.together import differing_sizes, some_together

if TYPE_CHECKING:
    from analysis.comparison.learning_rates import LearningRates

TOGETHER = "Runs trained together"  # bears on speed and memory, not on losses
PARAMS_TOLERANCE = 0.01  # parameters off by more than this share of the baseline's are flagged


Row = dict[str, Any]
Rows = list[Row] | pd.DataFrame


@dataclass(frozen=True)
class Flag:
    """A reason to doubt a comparison. ``blocking``: losses cannot be compared at all."""

    arm: str
    # data, tokenizer, tokens, params, code, device, dtype, versions, together, seeds, stopped, lost, lr, gate, reduced
    kind: str
    text: str
    blocking: bool = False


@dataclass(frozen=True)
class Match:
    """One thing that should be the same for all arms: its name, whether it is, and what it is."""

    what: str
    same: bool
    text: str


# column, kind, what to call it, whether losses are incomparable when it differs
_SAME = (
    ("data_sha256", "data", "data", True),
    ("tokenizer_sha256", "tokenizer", "tokenizer", True),
    ("tokens", "tokens", "training tokens", False),
    ("code_version", "code", "code version", False),
    ("device", "device", "device", False),
    ("kernel_wkv6", "device", "wkv6 kernel", False),
    ("kernel_ssd", "device", "ssd kernel", False),
    ("dtype", "dtype", "dtype", False),
    ("versions", "versions", "versions", False),
    ("members", "together", TOGETHER.lower(), False),
)


def find_flags(records: Records, runs: pd.DataFrame, arms: Iterable[str], baseline: str) -> list[Flag]:
    """Every reason to doubt a comparison with ``baseline``, in the order of ``arms``."""
    runs = runs.assign(dtype=_dtypes(records, runs), versions=[_version_words(text) for text in runs["versions"]])
    runs["stop_reason"] = [_stop_words(run, why) for run, why in zip(records.runs, runs["stop_reason"], strict=True)]
    columns = ["arm", "params_total", "seed_init", "seed_data", "status", "stop_reason", *(same[0] for same in _SAME)]
    by_arm: dict[str, list[Row]] = defaultdict(list)  # plain rows: 400 arms are 400 small frames otherwise
    for row in runs[columns].to_dict("records"):
        by_arm[row["arm"]].append(row)
    lost: dict[str | None, Counter[str]] = defaultdict(Counter)
    for item in records.left_out:
        lost[item.arm][item.kind] += item.kind != "duplicate"
    return [flag for arm in arms for flag in _flags_of(arm, by_arm[arm], by_arm[baseline], lost[arm])]


def _flags_of(arm: str, own: list[Row], base: list[Row], lost: Counter[str]) -> Iterable[Flag]:
    for column, kind, name, blocking in _SAME:
        values, expected = _values(own, column), _values(base, column)
        if column == "versions":
            values, expected = _apart(values, expected)
        so = "; speed and memory are not comparable" if kind == "together" else ""
        if len(values) > 1:
            yield Flag(arm, kind, f"its own runs differ in {name}: {_listed(values)}{so}", blocking)
        elif values != expected and len(expected) == 1:
            yield Flag(arm, kind, f"{name} {_listed(values)} instead of {_listed(expected)}{so}", blocking)

    sizes = _values(own, "params_total")
    params, base_params = _mean(own, "params_total"), _mean(base, "params_total")
    known = [size for size in sizes if isinstance(size, float) and size > 0]
    if known and max(known) / min(known) - 1 > PARAMS_TOLERANCE:
        yield Flag(arm, "params", f"its own runs differ in parameters: {_listed(sizes)}")
    if abs(params / base_params - 1) > PARAMS_TOLERANCE:
        yield Flag(arm, "params", f"parameters {params / base_params - 1:+.1%}")

    missing = _seeds(base) - _seeds(own)
    if missing:
        yield Flag(arm, "seeds", f"no usable run with {seed_words(missing)}")
    stopped = [row["stop_reason"] for row in own if row["status"] == "stopped"]
    reasons = Counter(reason if isinstance(reason, str) else "no reason recorded" for reason in stopped)
    for reason, count in reasons.most_common():
        yield Flag(arm, "stopped", f"{count} of {len(own)} stopped early ({reason})")
    for kind, count in (+lost).items():
        yield Flag(arm, "lost", f"{count} {kind} run{'s' if count > 1 else ''}")


def rate_flags(rates: LearningRates | None, arms: list[str]) -> list[Flag]:
    """A flag on the arm that is its group's best where that is the lowest or highest learning rate tried."""
    if rates is None:
        return []
    edge = rates.table[rates.table["best"] & rates.table["edge"]]
    text = "its learning rate, {:g}, is the best of its group and at the edge of the range tried"
    return [Flag(row.arm, "lr", text.format(row.lr)) for row in edge.itertuples() if row.arm in arms]


def _stop_words(run: Run, reason: object) -> object:
    """Why a run stopped, without the numbers, which are different in every run: the rule, or the gates."""
    rule = stopped_by(run)
    if rule:
        return f"rule {rule}"
    if isinstance(reason, str) and reason.startswith("gate "):
        return ", ".join(part.partition(":")[0] for part in reason.split("; ") if part.startswith("gate "))
    return reason


def _dtypes(records: Records, runs: pd.DataFrame) -> list[str | None]:
    """The number format of each run: one config.yaml per arm is read for it."""
    first = {run.arm: run.path for run in reversed(records.runs)}
    found = {arm: configured(path, "trainer", "dtype") for arm, path in first.items()}
    return [found.get(arm) for arm in runs["arm"]]


def _apart(values: list[object], expected: list[object]) -> tuple[list[object], list[object]]:
    """Lists of versions without the packages that are the same in all of them."""
    listed = [set(str(value).split(", ")) for value in (*values, *expected)]
    common = set.intersection(*listed)
    words = [", ".join(sorted(one - common)) for one in listed]
    return words[: len(values)], words[len(values) :]  # type: ignore[return-value]


def _version_words(text: object) -> str | None:
    """``torch 2.13.0, triton 3.8.0``; without Python's patch release, which changes no number."""
    if not isinstance(text, str):
        return None
    try:
        versions = json.loads(text)
    except ValueError:
        return text
    if not isinstance(versions, dict):
        return text
    named = {name: str(version) for name, version in versions.items()}
    if "python" in named:
        named["python"] = ".".join(named["python"].split(".")[:2])
    return ", ".join(f"{name} {version}" for name, version in sorted(named.items()))


def matches(runs: pd.DataFrame, baseline: str) -> list[Match]:
    """What was matched over all arms, for the top of the report."""
    found = []
    for column, what in (("data_sha256", "Data"), ("tokenizer_sha256", "Tokenizer")):
        name = "data" if column == "data_sha256" else "tokenizer"
        values = _values(runs, column)
        names = ", ".join(str(value) for value in dict.fromkeys(runs[name].dropna()))
        found.append(Match(what, len(values) == 1, f"{names} (sha256 {_listed(values)})"))
    for column, what in (("tokens", "Tokens per run"), ("steps", "Steps")):
        values = _values(runs, column)
        found.append(Match(what, len(values) == 1, _listed(values)))

    by_arm = runs.groupby("arm")["params_total"].mean()
    low, high = by_arm.min(), by_arm.max()
    largest = (by_arm / by_arm[baseline] - 1).abs().max()
    text = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}, at most {largest:.2%} from the baseline"
    found.append(Match("Parameters", bool(largest <= PARAMS_TOLERANCE), "not recorded" if low != low else text))

    seeds = {arm: _seeds(group) for arm, group in runs.groupby("arm")}
    shared = set.intersection(*seeds.values())
    same = all(own == shared for own in seeds.values())
    text = seed_words(shared).partition(" ")[2] if shared else "none shared by all arms"
    found.append(Match("Seeds", same, text if same or not shared else f"{text} in all arms; some have others too"))
    for columns, what in ((["code_version"], "Code version"), (["device", "kernel_wkv6", "kernel_ssd"], "Device")):
        values = [_values(runs, column) for column in columns]
        text = ", ".join(_listed(value) for value in values)
        if what == "Device" and len(values[0]) == 1:
            text = f"{_listed(values[0])}; kernels wkv6 {_listed(values[1])}, ssd {_listed(values[2])}"
        found.append(Match(what, all(len(value) == 1 for value in values), text))
    if some_together(runs):
        found.append(Match(TOGETHER, not differing_sizes(runs), _listed(_values(runs, "members"))))
    return found


def seed_words(seeds: Iterable[Seeds]) -> str:
    """``seeds 0, 1`` where both seeds of each pair are the same, else ``seeds 0/1, 0/2`` (init/data)."""
    seeds = sorted(seeds)
    words = [str(init) if init == data else f"{init}/{data}" for init, data in seeds]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(words)}" + (" (init/data)" if "/" in "".join(words) else "")


def _seeds(runs: Rows) -> set[Seeds]:
    return {
        (int(init), int(data))
        for init, data in zip(*(_column(runs, f"seed_{of}") for of in ("init", "data")), strict=True)
    }


def _values(runs: Rows, column: str) -> list[object]:
    """The distinct values of a column, None for those not recorded."""
    return sorted(
        {None if value != value else value for value in _column(runs, column)}, key=lambda v: (v is None, v or 0)
    )


def _column(runs: Rows, column: str) -> Iterable[Any]:
    return runs[column] if isinstance(runs, pd.DataFrame) else (row[column] for row in runs)


def _mean(runs: Rows, column: str) -> float:
    values = [value for value in _column(runs, column) if value == value]
    return sum(values) / len(values) if values else math.nan


def _listed(values: list[object]) -> str:
    def word(value: object) -> str:
        if value is None:
            return "not recorded"
        if isinstance(value, float):
            return f"{value:,.0f}"
        return str(value)[:12] if re.fullmatch(r"\w{13,}", str(value)) else str(value)  # a hash by its beginning

    words = [word(value) for value in values]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
