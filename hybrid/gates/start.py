"""The gates before the first step: kernels, forward pass, entropy."""

from __future__ import annotations

from typing import Any

from hybrid.config import used_parts
from hybrid.gates.gate import NOT_APPLICABLE, Gate, Reading, in_words, is_number, judge

OPS = {"rwkv": ("wkv6",), "mamba": ("ssd", "conv")}  # what a branch needs


class Kernels(Gate):
    """G0: what serves the recurrences and the short convolution.

    Fails where one that was asked for is missing or another serves, warns where a GPU runs one in plain PyTorch.
    """

    name, test = "G0", "kernels"

    def begin(self, environment: dict[str, Any]) -> Reading | None:
        parts = used_parts(self.cfg.model)
        ops = [op for part, needed in OPS.items() if part in parts for op in needed]
        if not ops:
            return Reading(NOT_APPLICABLE, "no recurrence in this model")
        served = {op: environment["kernels"].get(op) for op in ops}
        text = ", ".join(f"{op}: {backend or 'nothing'}" for op, backend in served.items())
        more = {"kernels": served}
        for op, backend in served.items():
            asked = getattr(self.cfg.kernels, op, "auto")
            one_asked_for = asked == "auto" or backend in (asked, *asked.split("+"))
            if backend in (None, "auto") or not one_asked_for:
                return Reading("fail", f"{op} is served by {backend or 'nothing'}, asked for: {asked}", more=more)
        slow = [op for op, backend in served.items() if backend == "torch"]
        if environment["device"] != "cpu" and slow:
            return Reading("warn", f"{text}; plain PyTorch on a GPU is slow: {', '.join(slow)}", more=more)
        return Reading("pass", f"{text}, on {environment['device']}", more=more)

    def thresholds(self) -> str:
        return "all there / plain PyTorch on a GPU / missing"


class Forward(Gate):
    """G1: the first forward pass has the right shapes and only finite numbers."""

    name, test = "G1", "forward pass"

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Reading | None:
        if row["kind"] != "probe" or row["step"] != 0:
            return None
        wrong = [] if row["shape_ok"] else ["wrong shapes"]
        wrong += [] if row["finite"] else ["NaN or infinite logits"]
        return Reading("fail" if wrong else "pass", " and ".join(wrong) or "shapes right, all logits finite")

    def thresholds(self) -> str:
        return "shapes right, finite / - / else"


class InitialEntropy(Gate):
    """G2: entropy of the next-token distribution at step 0.

    The specification's 2.0 to 5.0 nats suit vocabularies of 8 to 148: a model that knows nothing has ln V. Divided by
    ln V it is near 1 for any vocabulary, and below only where the model is sure of something before it learnt.
    """

    name, test = "G2", "initial entropy"

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Reading | None:
        if row["kind"] != "probe" or row["step"] != 0:
            return None
        settings = self.cfg.gates.G2
        found: dict[str, dict[str, Any]] = {}
        for name, key in (("normalised", "entropy_normalised"), ("specified", "entropy")):
            value = row[key]
            if is_number(value):
                found[name] = {"verdict": judge(value, getattr(settings, name)), "value": value}
            elif is_number(row["entropy"]):  # a vocabulary of one symbol
                found[name] = {"verdict": NOT_APPLICABLE, "value": None}
            else:
                found[name] = {"verdict": "fail", "value": None}
        decides = found[settings.reading]
        if not is_number(row["entropy"]):
            return Reading("fail", "the entropy is not finite", more=found)
        share = "" if found["normalised"]["value"] is None else f", {found['normalised']['value']:.3f} of ln V"
        other = "specified" if settings.reading == "normalised" else "normalised"
        text = f"{row['entropy']:.3f} nats{share} ({other} reading: {found[other]['verdict']})"
        return Reading(decides["verdict"], text, decides["value"], found)

    def thresholds(self) -> str:
        settings = self.cfg.gates.G2
        unit = " of ln V" if settings.reading == "normalised" else " nats"
        return in_words(getattr(settings, settings.reading)) + unit
