"""The stopping rules at work: real runs that end early or train on more slowly, say why, and resume to the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.config import from_yaml
from hybrid.data import Corpus
from hybrid.model import HybridLM
from hybrid.records import RunFolder
from hybrid.schema import Config
from hybrid.training import loop
from hybrid.training.loop import Trainer
from hybrid.training.schedule import lr_factor
from hybrid.training.step import StackStep
from tests.runs import Killed, Setting, cli, results, rows, same_weights, strict_json, weights

pytestmark = pytest.mark.usefixtures("one_thread")

# No evaluation is 10 nats better than the first: a plateau from the end of the warm-up at step 2 on. Its rate is
# lowered at 8 (15% of 40 steps later) and, unless something else is said, the run stops at 14, after 6 more.
PLATEAU = ("stopping.plateau.min_delta=10", "trainer.max_steps=40", "trainer.eval_every=2", "trainer.log_every=1")
GO_ON = ("stopping.plateau.stop=false", "stopping.reductions.enabled=false")


def events(summary: dict[str, Any]) -> list[tuple[str, int, str, bool]]:
    found = summary["stopping"]["events"]
    assert all(event.keys() == {"rule", "step", "action", "reason", "acted"} for event in found)
    return [(event["rule"], event["step"], event["action"], event["acted"]) for event in found]


def all_of(summary: dict[str, Any]) -> dict[str, Any]:
    return results(summary) | {key: summary[key] for key in ("stopping", "stop_reason")}


def learning_rates(folder: RunFolder) -> list[float]:
    return [row["lr"] for row in rows(folder) if row["kind"] == "train"]


# ---- runs that are stopped


def test_a_run_that_overfits_stops_and_says_why(small: Setting, tmp_path: Path) -> None:
    """It learns one sentence by heart; the validation text has the same letters in another order."""
    sentence = "to be or not to be that is the question "
    (tmp_path / "text.txt").write_text(sentence * 90 + sentence[::-1] * 10)
    options = ("optim.lr=0.01", "trainer.max_steps=200", "trainer.eval_every=5", f"data.path={tmp_path}/text.txt")
    folder, summary = small.run(*options)
    assert summary["status"] == "stopped" and summary["steps"] < 100
    (event,) = summary["stopping"]["events"]
    assert (event["rule"], event["action"], event["acted"]) == ("overfitting", "stop", True)
    assert summary["stop_reason"] == f"overfitting: {event['reason']}" and event["step"] == summary["steps"]
    evaluations = [row for row in rows(folder) if row["kind"] == "eval"]
    last, best = evaluations[-1], min(evaluations, key=lambda row: row["val_loss"])
    assert last["step"] == summary["steps"] and last["val_loss"] > 1.1 * best["val_loss"]
    assert all(row["val_loss"] <= 1.1 * best["val_loss"] for row in evaluations[best["step"] // 5 : -1])
    assert f"{last['val_loss']:.4f}" in event["reason"] and f"{best['val_loss']:.4f}" in event["reason"]
    assert summary["stop_reason"] in folder.log.read_text()
    others = ("stopping.overfitting.enabled=false", "stopping.plateau.enabled=false", "trainer.max_steps=40")
    _, summary = small.run(*options, *others)
    assert (summary["status"], summary["steps"]) == ("completed", 40)


def test_a_run_that_learns_nothing_more_is_slowed_down_and_stopped(small: Setting) -> None:
    options = ("optim.lr=1e-12", "stopping.collapse.enabled=false", *PLATEAU[1:])  # RWKV-6 stays silent, too
    answer = cli(small.with_(*options, "display.progress=plain"))
    assert answer.code == 0
    (path,) = small.out.glob("single/*")
    summary = strict_json((path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 14)
    assert events(summary) == [("plateau", 8, "reduce_lr", True), ("plateau", 14, "stop", True)]
    lowered, stopped = summary["stopping"]["events"]
    assert summary["stop_reason"] == f"plateau: {stopped['reason']}" and "converged" in stopped["reason"]
    for text in (answer.out, (path / "log.txt").read_text()):
        assert f"learning rate x0.6: plateau: {lowered['reason']}" in text
        assert f"stopped: {summary['stop_reason']}" in text
    cfg = from_yaml(path / "config.yaml")
    assert cfg.stopping.act is True


def test_the_learning_rate_is_lower_from_the_next_step_on(small: Setting) -> None:
    folder, summary = small.run(*PLATEAU, *GO_ON, "stopping.plateau.lr_factor=0.5", "optim.mamba_lr_mult=2")
    assert [step for _, step, _, _ in events(summary)] == [8, 14, 20, 26, 32, 38]
    cfg = from_yaml(folder.path / "config.yaml")
    scale = [0.5 ** max(0, (step - 3) // 6) for step in range(1, 41)]  # 1 up to step 8, then half of it every 6 steps
    expected = [0.003 * lr_factor(i, cfg) * scale[i] for i in range(40)]
    assert learning_rates(folder) == pytest.approx(expected, rel=1e-12)
    assert summary["status"] == "completed"


def test_a_lower_learning_rate_trains_more_slowly(small: Setting) -> None:
    """To the bit the same up to the reduction, then smaller updates."""
    lowered, _ = small.run(*PLATEAU, *GO_ON, "stopping.plateau.lr_factor=0.01", "trainer.max_steps=10")
    plain, summary = small.run(*PLATEAU, *GO_ON, "stopping.act=false", "trainer.max_steps=10")
    # 15% of 10 steps is 2, after the warm-up of 2
    assert events(summary)[:1] == [("plateau", 4, "reduce_lr", False)]

    def losses(folder: RunFolder) -> list[float]:
        return [row["loss"] for row in rows(folder) if row["kind"] == "train"]

    assert losses(lowered)[:5] == losses(plain)[:5]  # the loss of step 5 is from before its update
    assert losses(lowered)[5] != losses(plain)[5]
    change = [abs(a - b) for a, b in zip(*(losses(f)[4:9] for f in (lowered, plain)), strict=True)]
    assert change[0] == 0 < change[1]


def test_a_logged_step_can_stop_a_run_between_evaluations(small: Setting) -> None:
    """Limits that no ratio keeps: outside from step 3, the first after the warm-up, for 20% of 40 steps."""
    limits = ("stopping.grad_ratio.low=1e6", "stopping.grad_ratio.high=1e9", "stopping.grad_ratio.share=0.2")
    steps = ("trainer.max_steps=40", "trainer.eval_every=20", "trainer.log_every=1")
    folder, summary = small.run(*limits, *steps, "stopping.grad_ratio.min_steps=1")
    assert (summary["status"], summary["steps"]) == ("stopped", 11) and events(summary)[0][:2] == ("grad_ratio", 11)
    assert [(row["kind"], row["step"]) for row in rows(folder)][-2:] == [("train", 11), ("eval", 11)]


def test_rules_that_do_not_act_change_nothing(small: Setting) -> None:
    watched, summary = small.run(*PLATEAU, "stopping.act=false")
    plain, other = small.run(*PLATEAU[1:], "stopping=off", f"out={small.out}/off")
    assert rows(watched) == rows(plain) and same_weights(weights(watched), weights(plain))
    assert results(summary) == results(other)  # the same identity as well
    assert events(summary) == [("plateau", 8, "reduce_lr", False), ("plateau", 14, "stop", False)]
    assert other["stopping"] == {"act": True, "events": []}
    log = watched.log.read_text()
    assert "stopping rule at step 8, not acted upon (learning rate x0.6): plateau: no validation loss" in log
    assert "stopping rule at step 14, not acted upon (stop): plateau: converged" in log


# ---- resuming

RESUMED = (*PLATEAU, "model.dropout=0.1", "stopping.plateau.stop_after=0.9", "stopping.reductions.limit=3")
# lowered at 8, 14 and 20; at 26 three reductions have not helped


def dying(step: int, number: signal.Signals | None) -> Callable[[Trainer, int], None]:
    """``Trainer._update`` that dies at ``step``, or has a signal arrive."""
    original = Trainer._update

    def update(self: Trainer, current: int) -> None:
        if current == step and number is None:
            raise Killed
        if current == step:
            os.kill(os.getpid(), number)
        original(self, current)

    return update


def test_killed_and_resumed_the_same_happens(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before and after the reductions, stopped by Ctrl-C in the very step of one."""
    reference, expected = small.run(*RESUMED, f"out={small.out}/whole")
    assert events(expected) == [
        *[("plateau", step, "reduce_lr", True) for step in (8, 14, 20)],
        ("reductions", 26, "stop", True),
    ]
    for number, step, resumes in ((None, 6, 3), (None, 11, 9), (signal.SIGINT, 14, 14), (signal.SIGTERM, 19, 19)):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_update", dying(step, number))
            with pytest.raises((Killed, KeyboardInterrupt)):
                small.run(*RESUMED)
        folder = small.plan(*RESUMED).folder
        assert [path.name for path in folder.checkpoints.glob("step-*")] == [f"step-{resumes:08d}"]
    folder, summary = small.run(*RESUMED)
    assert all_of(summary) == all_of(expected) and rows(folder) == rows(reference)
    assert same_weights(weights(folder, "best"), weights(reference, "best"))
    assert "resumes after step 19" in folder.log.read_text()


# ---- the step that is one graph on a GPU


def stacked(cfgs: list[Config], models: list[HybridLM], corpus: Corpus) -> StackStep:
    return StackStep(cfgs, models, corpus)


def test_the_stacked_step_lowers_its_learning_rate_as_the_plain_one(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*PLATEAU, *GO_ON, "stopping.plateau.lr_factor=0.3", "optim.mamba_lr_mult=0.5")
    plain, summary = small.run(*options, f"out={small.out}/plain")
    kept: list[float] = []
    original = StackStep.update

    def update(self: StackStep, inputs: Tensor, targets: Tensor) -> Tensor:
        kept.append(float(self.lr_now.max()))
        return original(self, inputs, targets)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_step", stacked)
        patch.setattr(StackStep, "update", update)
        fast, other = small.run(*options, f"out={small.out}/stacked")
        assert kept == pytest.approx(learning_rates(plain), rel=1e-5)  # what the optimiser really had
        assert events(other) == events(summary) and learning_rates(fast) == learning_rates(plain)
        for ours, theirs in zip(rows(fast), rows(plain), strict=True):
            for key in ("loss", "val_loss"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (theirs["step"], key)
        for ours, theirs in zip(weights(fast).values(), weights(plain).values(), strict=True):
            assert (ours - theirs).norm() < 1e-3 * theirs.norm() + 1e-6
        with monkeypatch.context() as death:
            death.setattr(Trainer, "_update", dying(16, None))
            with pytest.raises(Killed):
                small.run(*options, f"out={small.out}/again")
        again, summary = small.run(*options, f"out={small.out}/again")
    assert rows(again) == rows(fast) and all_of(summary) == all_of(other)
    assert same_weights(weights(again), weights(fast))


# ---- sweeps

SWEEP = ("seed_init=0,1", "seed_data=0", "sweep.name=s", "trainer.seeds_together=2", *PLATEAU)


def summaries(root: Path) -> list[dict[str, Any]]:
    return [strict_json(path.read_text()) for path in sorted(root.glob("*/summary.json"))]


def test_in_a_sweep_they_only_say_what_they_would_have_done(small: Setting) -> None:
    answer = cli(small.with_(*SWEEP), "-m")
    assert answer.code == 0 and "2 of 2 runs have a record" in answer.out
    assert answer.out.count("not acted upon (learning rate x0.6): plateau: ") == 2
    for summary in summaries(small.out / "s"):
        assert (summary["status"], summary["steps"], summary["environment"]["members"]) == ("completed", 40, 2)
        assert summary["stopping"]["act"] is False
        assert events(summary) == [("plateau", 8, "reduce_lr", False), ("plateau", 14, "stop", False)]
    assert all(from_yaml(path).stopping.act is False for path in small.out.glob("s/*/config.yaml"))
    assert "2 already done" in cli(small.with_(*SWEEP), "-m").out  # the same identity as planned


def test_in_an_unnamed_sweep_as_well(small: Setting) -> None:
    answer = cli(
        small.with_("seed_init=0,1", "trainer.max_steps=1", "trainer.eval_every=1", "schedule.warmup_steps=0"), "-m"
    )
    assert answer.code == 0
    found = summaries(small.out / "multirun")
    assert len(found) == 2 and not any(summary["stopping"]["act"] for summary in found)


def test_in_a_sweep_they_act_if_told_to(small: Setting) -> None:
    answer = cli(small.with_(*SWEEP, "stopping.act=true"), "-m")
    assert answer.code == 0 and "2 of 2 runs have a record" in answer.out
    for summary in summaries(small.out / "s"):
        assert (summary["status"], summary["steps"], summary["environment"]["members"]) == ("stopped", 14, 2)
        assert summary["stopping"]["act"] is True


def test_rules_that_only_stop_let_runs_train_together(small: Setting) -> None:
    answer = cli(small.with_(*SWEEP, "stopping.act=true", "stopping.plateau.reduce=false"), "-m")
    assert answer.code == 0
    for summary in summaries(small.out / "s"):
        # 20% of 40 steps after the warm-up of 2
        assert (summary["status"], summary["steps"], summary["environment"]["members"]) == ("stopped", 10, 2)


def test_checkpoints_of_the_rules_are_plain_data(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``torch.load(weights_only=True)`` demands, and with all that the record will say."""
    monkeypatch.setattr(Trainer, "_update", dying(16, None))
    with pytest.raises(Killed):
        small.run(*RESUMED)
    (step,) = small.plan(*RESUMED).folder.checkpoints.glob("step-*")
    state = torch.load(step / "training.pt", weights_only=True)["state"]
    assert state["lr_scale"] == pytest.approx(0.36) and len(state["watchers"]["stopping"]["events"]) == 2


# ---- on a GPU

CUDA = ("trainer.device=cuda", "trainer.dtype=float32")


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("model.branch_dropout=[1,0]",)], ids=" ".join)
def test_a_recorded_step_lowers_its_learning_rate(small: Setting, more: tuple[str, ...]) -> None:
    """As the plain step; also without RWKV-6 in every sequence, which is drawn in the graph."""
    options = (*PLATEAU, *GO_ON, *CUDA, "stopping.plateau.lr_factor=0.3", *more)
    plain, summary = small.run(*options, "trainer.compile=false", "trainer.cuda_graph=false", f"out={small.out}/plain")
    fast, other = small.run(*options, f"out={small.out}/fast")
    assert other["environment"]["cuda_graph"] and events(other) == events(summary)
    assert learning_rates(fast) == learning_rates(plain)
    for ours, theirs in zip(rows(fast), rows(plain), strict=True):
        for key in ("loss", "val_loss"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=5e-3), (theirs["step"], key)
