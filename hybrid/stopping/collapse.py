"""Collapse: what a branch gives becomes a constant."""

from __future__ import annotations

from typing import Any

from hybrid.stopping.rule import Finding, Rule, finite


class Collapse(Rule):
    """Stops where the variance of a branch's output is below ``variance`` in ``probes`` probe rows in a row.

    A branch must have been above it before, or have had the time to get there (``settled_after``), as in gate G3.5.
    """

    name = "collapse"
    needs_probe = True

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Finding | None:
        if row["kind"] != "probe":
            return None
        found = None
        for layer in row["layers"]:
            for branch, measured in layer["branches"].items():
                if not finite(measured.get("variance")):
                    continue
                place = f"{branch} of layer {layer['layer'] + 1}"
                reason = self._look(place, row["step"], measured["variance"], memory)
                found = found or reason
        return None if found is None else self.stop(found)

    def _look(self, place: str, step: int, variance: float, memory: dict[str, Any]) -> str | None:
        mine = memory.setdefault(place, {"alive": False, "low": []})
        if variance >= self.cfg.variance:
            mine.update(alive=True, low=[])
            return None
        if not mine["alive"] and step <= self.settled_after:
            return None
        mine["low"] = [*mine["low"], [step, variance]][-self.cfg.probes :]
        if len(mine["low"]) < self.cfg.probes:
            return None
        seen = ", ".join(f"{low:.2g} (step {at})" for at, low in mine["low"])
        return f"the output of {place} is constant: variance {seen}, limit {self.cfg.variance:g}"
