"""The gate on recurrent states."""

from __future__ import annotations

import math
from typing import Any

from hybrid.config import used_parts
from hybrid.gates.gate import NOT_APPLICABLE, Gate, Reading, in_words, is_number, judge, worst
from hybrid.training.watching import settled_after


class StateHealth(Gate):
    """G3.5: every recurrent state moves, uses enough directions and is not saturated; no branch is dead.

    The worst head of all layers decides. ``hybrid.states`` defines the readings. The specification's cosine of
    successive states fails healthy heads with slow decays, and its limit on large values fails RWKV-6 as soon as it is
    trained, although a GroupNorm takes their size out; the calibrated reading, which decides by default, does neither.
    Two things the specification checks elsewhere are read here as well: a branch whose output has no variance (once it
    had some, or after ``settled_after``, because RWKV-6 officially starts with an output of zero), and gates of the
    fusion that leave a branch out. Words count layers from 1, the rows from 0.
    """

    name, test = "G3.5", "state health"

    def begin(self, environment: dict[str, Any]) -> Reading | None:
        if used_parts(self.cfg.model) & {"rwkv", "mamba"}:
            return None
        return Reading(NOT_APPLICABLE, "no recurrent state in this model")

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Reading | None:
        if row["kind"] != "probe" or not used_parts(self.cfg.model) & {"rwkv", "mamba"}:
            return None
        if not row["finite"]:
            return Reading("fail", "the model's output is not finite", more={"specified": {"verdict": "fail"}})
        settings = self.cfg.gates.G3_5
        novelty, place = smallest(row, "novelty")
        found = {
            "cosine": largest(row, "cosine"),
            "calibrated_cosine": (None if novelty is None else calibrated_cosine(novelty), place),
            "top5_share": smallest(row, "top5_share"),
            "saturated": largest(row, "saturated"),
            "closed_gates": most_closed(row),
        }
        dead = self.dead(row, memory)
        verdicts = {"dead branches": "fail" if dead else "pass"}
        for name in ("cosine", "calibrated_cosine", "top5_share", "saturated", "closed_gates"):
            value = found[name][0]
            if value is not None:
                band = settings.cosine if "cosine" in name else getattr(settings, name)
                verdicts[name] = judge(value, band, strict=True)
        specified = {name: verdict for name, verdict in verdicts.items() if name != "calibrated_cosine"}
        calibrated = {name: verdict for name, verdict in verdicts.items() if name != "cosine"}
        if "saturated" in calibrated:
            calibrated["saturated"] = self.calibrated_saturation(row)
        decides, decisive = {
            "specified": ("cosine", specified), "calibrated": ("calibrated_cosine", calibrated),
        }[settings.reading]  # fmt: skip
        verdict = worst(list(decisive.values()))
        text = ", ".join(words(name, *found[name]) for name in (decides, "top5_share", "saturated", "closed_gates")
                         if found[name][0] is not None)  # fmt: skip
        text += f"; dead: {', '.join(dead)}" if dead else ""
        if verdict in ("warn", "fail"):
            text += f" ({verdict}: {', '.join(n.replace('_', ' ') for n, v in decisive.items() if v == verdict)})"
        more: dict[str, Any] = {name: value for name, (value, _) in found.items()}
        more |= {"novelty": novelty, "effective_rank": smallest(row, "effective_rank")[0], "dead": dead}
        table = [verdicts[name] for name in ("cosine", "top5_share", "saturated") if name in verdicts]
        more["specified"] = {"verdict": worst(table), "value": found["cosine"][0]}  # the specification's three alone
        return Reading(verdict, text, found[decides][0], more)

    def calibrated_saturation(self, row: dict[str, Any]) -> str:
        """RWKV-6 normalises what it reads from its state, so large values there harm nothing: they warn at most."""
        found = []
        for value, place in worst_heads(row, "saturated"):
            verdict = judge(value, self.cfg.gates.G3_5.saturated, strict=True)
            found.append("warn" if "rwkv" in place and verdict == "fail" else verdict)
        return worst(found)

    def dead(self, row: dict[str, Any], memory: dict[str, Any]) -> list[str]:
        """The branches without variance that had some before or should have by now."""
        alive = memory.setdefault("alive", [])
        dead = []
        for place, branch in branches(row):
            if not is_number(branch["variance"]):
                continue
            if branch["variance"] >= self.cfg.gates.G3_5.least_variance:
                if place not in alive:
                    alive.append(place)
            elif place in alive or row["step"] > settled_after(self.cfg):
                dead.append(place)
        return dead

    def thresholds(self) -> str:
        settings = self.cfg.gates.G3_5
        return (
            f"cosine < {settings.cosine.passes[1]:g} / to {settings.cosine.warns[1]:g} / above; "
            f"top-5 share {in_words(settings.top5_share, percent=True)}; "
            f"saturated {in_words(settings.saturated, percent=True)}"
        )


def calibrated_cosine(novelty: float) -> float:
    """As in ``hybrid.states``: 0 where the state is renewed, 1 where it is frozen."""
    return math.sqrt(1 - min(1.0, novelty) ** 2)


def branches(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"layer {layer['layer'] + 1} {name}", branch)
        for layer in row["layers"]
        for name, branch in layer["branches"].items()
    ]


def worst_heads(row: dict[str, Any], name: str) -> list[tuple[float, str]]:
    found = [(branch[name]["worst"], place) for place, branch in branches(row) if branch.get(name)]
    return [(value, place) for value, place in found if is_number(value)]


def largest(row: dict[str, Any], name: str) -> tuple[float | None, str]:
    """The largest of the worst heads' readings in all layers, and where it is."""
    return max(worst_heads(row, name), default=(None, ""))


def smallest(row: dict[str, Any], name: str) -> tuple[float | None, str]:
    return min(worst_heads(row, name), default=(None, ""))


def most_closed(row: dict[str, Any]) -> tuple[float | None, str]:
    gates = [(layer["gate"]["closed"], f"layer {layer['layer'] + 1}") for layer in row["layers"] if layer.get("gate")]
    return max((gate for gate in gates if is_number(gate[0])), default=(None, ""))


def words(name: str, value: float, place: str) -> str:
    number = f"{value:.3f}" if "cosine" in name else f"{value:.0%}"
    return f"{name.replace('_', ' ').replace('top5', 'top-5')} {number} ({place})"
