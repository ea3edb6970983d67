"""The gates on the logged training steps: the first steps, and the balance of the two parts."""

from __future__ import annotations

from math import pi
from statistics import fmean, median
from typing import Any

from hybrid.config import used_parts
from hybrid.gates.gate import NOT_APPLICABLE, Gate, Reading, in_words, is_number, judge, worst
from hybrid.training.watching import RATIO_WINDOW, settled_after

LEAST_ROWS = 6  # logged steps before anything is said of a trend
CERTAIN = 3.0  # standard errors


class FirstSteps(Gate):
    """G3: over the first 1,000 steps the loss falls, and the gradient norm is moderate.

    Live at every logged step, final when the steps are over or the run is. The norm is the median over the logged
    steps (before clipping), so that one large gradient decides nothing. Loss that changes by no more than its noise
    warns; so do norms that the specification's table leaves out.
    """

    name, test = "G3", "first steps"

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Reading | None:
        most, last = self.cfg.gates.G3.steps, self.cfg.trainer.max_steps
        if row["kind"] != "train" or row["step"] > most:
            return None
        loss, norm, step = row["loss"], row["grad_norm"], row["step"]
        if not (is_number(loss) and is_number(norm)):
            return Reading("fail", f"loss or gradient norm not finite at step {step}", more={"final": True})
        losses = memory["losses"] = [*memory.get("losses", []), loss]
        norms = memory["norms"] = [*memory.get("norms", []), norm]
        upto = min(most, last)
        final = step >= upto or (step + self.cfg.trainer.log_every > upto and upto < last)
        more: dict[str, Any] = {"steps": step, "of": most, "final": final}
        if len(losses) < LEAST_ROWS:
            text = f"{len(losses)} logged steps of at least {LEAST_ROWS}: too few to judge"
            return Reading(NOT_APPLICABLE, text, more=more)
        fall, error = fall_of(losses)
        typical = median(norms)
        trend = "falls" if fall > CERTAIN * error else "rises" if fall < -CERTAIN * error else "does not move"
        verdict = worst(
            [{"falls": "pass", "rises": "fail"}.get(trend, "warn"), judge(typical, self.cfg.gates.G3.grad_norm)]
        )
        text = (
            f"loss {trend} ({-fall:+.3f} +- {error:.3f} nats), gradient norm {typical:.2f}, {step:,} of {most:,} steps"
        )
        warmup = self.cfg.schedule.warmup_steps
        if step < warmup:
            text += f"; warm-up until step {warmup:,}"
        return Reading(verdict, text, typical, more | {"loss_change": -fall, "loss_change_error": error})

    def thresholds(self) -> str:
        return f"loss falls, norm {in_words(self.cfg.gates.G3.grad_norm)} or loss rises"


def fall_of(losses: list[float]) -> tuple[float, float]:
    """By how much the median of the last third is below the median of the first, and the standard error of that.

    The noise of one value comes from second differences, which a steady fall does not enter: their median absolute
    value over 0.6745 sqrt(1.5) is its standard deviation. A median of n has pi/2 times the variance of a mean.
    """
    third = len(losses) // 3
    fall = median(losses[:third]) - median(losses[-third:])
    bends = [abs(b - (a + c) / 2) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    noise = median(bends) / (0.6745 * 1.5**0.5)
    return fall, noise * (pi / 2 * 2 / third) ** 0.5


class Balance(Gate):
    """G4: ratio of the gradient norms of the RWKV-6 and the Mamba-2 parameters, each a mean over tensors.

    Every 100 steps, of the mean over the last ten logged steps, as the summary's ``grad_ratio`` is. With the official
    initialisation RWKV-6's gradient is nearly zero at first and grows for some hundred steps: runs that are well have
    ratios of 0.05 there. So until ``settled_after`` the ratio warns at most, and what is judged later is of the steps
    after it. The specification's reading, which knows no such time, stands beside it with its own worst.
    """

    name, test = "G4", "component balance"

    def begin(self, environment: dict[str, Any]) -> Reading | None:
        if used_parts(self.cfg.model) >= {"rwkv", "mamba"}:
            return None
        return Reading(NOT_APPLICABLE, "the model does not have both RWKV-6 and Mamba-2")

    def see(self, row: dict[str, Any], memory: dict[str, Any]) -> Reading | None:
        if row["kind"] != "train" or "grad_ratio" not in row:
            return None
        ratio, step, every = row["grad_ratio"], row["step"], self.cfg.gates.G4.every
        early = step <= settled_after(self.cfg)
        if not early and not memory.get("settled"):
            memory.update(settled=True, ratios=[])
        ratios = memory["ratios"] = [*memory.get("ratios", []), ratio][-RATIO_WINDOW:]
        if step // every == memory.get("step", 0) // every:
            return None
        memory["step"] = step
        if not all(map(is_number, ratios)):
            return Reading("fail", f"ratio not finite among the last {len(ratios)} logged steps")
        value = fmean(ratios)
        text = f"RWKV/Mamba {value:.3f} over {len(ratios)} logged steps to {step:,}"
        verdict = specified = judge(value, self.cfg.gates.G4.grad_ratio)
        if early:
            verdict = "warn" if specified == "fail" else specified
            when = "warm-up" if step <= self.cfg.schedule.warmup_steps else "early"
            text += f"; {when}: warns at most until step {settled_after(self.cfg):,}"
        before = memory.get("specified")
        if before is None or worst([specified, before["worst"]]) != before["worst"]:
            before = memory["specified"] = {"worst": specified, "worst_step": step}
        return Reading(verdict, text, value, {"specified": {"verdict": specified, "value": value, **before}})

    def thresholds(self) -> str:
        return in_words(self.cfg.gates.G4.grad_ratio)
