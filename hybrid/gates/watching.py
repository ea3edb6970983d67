"""All gates over a run: verdicts for the record, flags for the person, an end where a failed gate is to stop it."""

from __future__ import annotations

from typing import Any

from hybrid.gates.gate import NOT_APPLICABLE, ORDER, Gate, Reading
from hybrid.gates.start import Forward, InitialEntropy, Kernels
from hybrid.gates.states import StateHealth
from hybrid.gates.training import Balance, FirstSteps
from hybrid.schema import Config
from hybrid.training.watching import RED_FLAG, Action, Watcher

ALL: tuple[type[Gate], ...] = (Kernels, Forward, InitialEntropy, FirstSteps, StateHealth, Balance)

UNREAD = "not reached"


class GateWatcher(Watcher):
    """Shows every row to every gate. ``state``: per gate its part of the summary, and its memory."""

    name = "gates"
    needs_probe = True

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.gates = [gate(cfg) for gate in ALL]
        self.lines: list[str] = []
        unread = {"verdict": NOT_APPLICABLE, "reading": UNREAD, "value": None, "worst": NOT_APPLICABLE,
                  "worst_step": None}  # fmt: skip
        self.state = {
            "records": {gate.name: dict(unread) for gate in self.gates},
            "memories": {gate.name: {} for gate in self.gates},
        }

    def begin(self, environment: dict[str, Any]) -> Action | None:
        return self._take([(gate, gate.begin(environment)) for gate in self.gates], 0)

    def see(self, row: dict[str, Any]) -> Action | None:
        memories = self.state["memories"]
        return self._take([(gate, gate.see(row, memories[gate.name])) for gate in self.gates], row["step"])

    def see_failed(self, name: str, text: str) -> None:
        """A gate could not be reached, because what it looks at raised an error that ``text`` says."""
        self._take([(gate, Reading("fail", text)) for gate in self.gates if gate.name == name], 0)

    def _take(self, found: list[tuple[Gate, Reading | None]], step: int) -> Action | None:
        self.lines = []
        reasons = []
        for gate, reading in found:
            if reading is None:
                continue
            before = self.state["records"][gate.name]
            after = {"verdict": reading.verdict, "reading": reading.text, "value": reading.value}
            worse = ORDER.index(reading.verdict) > ORDER.index(before["worst"])
            after |= {"worst": reading.verdict, "worst_step": step} if worse else {
                key: before[key] for key in ("worst", "worst_step")
            }  # fmt: skip
            self.state["records"][gate.name] = after | reading.more
            said = f"{gate.name} {gate.test}"
            if reading.verdict == "fail" != before["verdict"]:
                self.lines.append(f"{RED_FLAG}: {said} fails at step {step}: {reading.text}")
            elif before["verdict"] == "fail" != reading.verdict:
                self.lines.append(f"{said} no longer fails at step {step} ({reading.verdict}): {reading.text}")
            if reading.verdict == "fail" and getattr(self.cfg.gates.on_fail, gate.key) == "stop":
                reasons.append(f"gate {said}: {reading.text}")
        return Action("; ".join(reasons)) if reasons else None

    def summary(self) -> dict[str, Any]:
        return {"gates": self.state["records"]}

    def news(self) -> list[str]:
        return self.lines
