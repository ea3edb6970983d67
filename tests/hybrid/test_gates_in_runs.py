"""What a run makes of the gates' verdicts, and their settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hybrid import build_model
from hybrid.config import ConfigError, identity
from hybrid.gates.gate import Reading
from hybrid.gates.start import Kernels
from hybrid.gates.watching import GateWatcher
from hybrid.model import HybridLM
from hybrid.run import execute
from hybrid.training import member
from hybrid.training.loop import Trainer
from hybrid.training.watching import RED_FLAG, Action
from tests.hybrid.configs import config
from tests.hybrid.gate_rows import branch, fill, probe_row, told
from tests.runs import Setting, rows

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what a run makes of them


def test_flags_once_a_change_and_the_worst_is_kept() -> None:
    watcher = told([])
    said: list[list[str]] = []
    for step, ratio in ((100, 1.0), (200, 0.01), (300, 0.01), (400, 5.0), (500, 1.0), (600, 0.02)):
        watcher.state["memories"]["G4"].pop("ratios", None)
        watcher.see({"kind": "train", "step": step, "loss": 3.0, "grad_norm": 1.0, "grad_ratio": ratio})
        said.append([line for line in watcher.news() if "G4" in line])
    assert [len(lines) for lines in said] == [0, 1, 0, 1, 0, 1]
    assert said[1][0].startswith(RED_FLAG) and "fails at step 200: RWKV/Mamba 0.010" in said[1][0]
    assert (
        said[3][0]
        == "G4 component balance no longer fails at step 400 (warn): RWKV/Mamba 5.000 over 1 logged steps to 400"
    )
    found = watcher.summary()["gates"]["G4"]
    assert (found["verdict"], found["worst"], found["worst_step"]) == ("fail", "fail", 200)
    watcher.see({"kind": "train", "step": 700, "loss": 3.0, "grad_norm": 1.0, "grad_ratio": 1.96})
    found = watcher.summary()["gates"]["G4"]  # mean 0.99
    assert (found["verdict"], found["value"], found["worst_step"]) == ("pass", pytest.approx(0.99), 200)
    watcher.see({"kind": "eval", "step": 700, "val_loss": 3.0})
    assert watcher.news() == []


def test_a_gate_asks_for_the_end_only_where_it_is_to() -> None:
    bad = probe_row(finite=False, entropy=None, entropy_normalised=None)
    action = GateWatcher(config()).see(bad)
    assert action is not None and action.lr_factor is None
    assert action.reason == "gate G1 forward pass: NaN or infinite logits"
    assert GateWatcher(config("gates.on_fail.G1=warn")).see(bad) is None
    both = GateWatcher(config("gates.on_fail.G2=stop")).see(bad)
    assert (
        both.reason
        == "gate G1 forward pass: NaN or infinite logits; gate G2 initial entropy: the entropy is not finite"
    )
    frozen = probe_row(mamba=branch(novelty=0.0))
    assert GateWatcher(config()).see(frozen) is None
    assert "G3.5" in GateWatcher(config("gates.on_fail.G3_5=stop")).see(frozen).reason


def test_a_failed_gate_stops_a_run_with_its_reason(small: Setting) -> None:
    norms = ("gates.G3.grad_norm={passes: [500, 600], warns: [400, 700]}", "trainer.log_every=1")
    folder, summary = small.run("gates.on_fail.G3=stop", *norms, "trainer.eval_every=100")
    found = summary["gates"]["G3"]
    assert f"gradient norm {found['value']:.2f}, 6 of 1,000 steps" in found["reading"]
    reason = f"gate G3 first steps: {found['reading']}"
    assert (summary["status"], summary["steps"], summary["stop_reason"]) == ("stopped", 6, reason)
    assert f"red flag: G3 first steps fails at step 6: {found['reading']}" in folder.log.read_text()
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4, 5, 6, 6]  # it ends with an evaluation
    other, warned = small.run(*norms)
    assert (warned["status"], warned["steps"], warned["gates"]["G3"]["verdict"]) == ("completed", 12, "fail")
    assert other.path != folder.path  # what may stop a run is part of its identity


def test_a_model_that_starts_broken_takes_no_step(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cfg: Any) -> HybridLM:
        model = build_model(cfg)
        fill(model.norm.weight, math.nan)
        return model

    monkeypatch.setattr(member, "build_model", broken)
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("it takes a step"))
    folder, summary = small.run()
    assert (summary["status"], summary["steps"]) == ("stopped", 0)
    assert summary["stop_reason"] == "gate G1 forward pass: NaN or infinite logits"
    assert [row["kind"] for row in rows(folder)] == ["eval"] and summary["gates"]["G3"]["verdict"] == "n/a"


def test_an_end_asked_for_before_the_first_row_comes_after_an_evaluation(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("it takes a step"))
    monkeypatch.setattr(Kernels, "begin", lambda *_: Reading("fail", "wkv6 is served by nothing"))
    folder, summary = small.run()
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("stopped", 0, 0)
    assert summary["stop_reason"] == "gate G0 kernels: wkv6 is served by nothing"
    assert [row["kind"] for row in rows(folder)] == ["eval"] and summary["final_val_loss"] > 0
    assert not (folder.checkpoints / "final.safetensors").exists()


def test_a_learning_rate_lowered_at_step_0_holds_from_step_1_on(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GateWatcher, "begin", lambda *_: Action("half of it", 0.5))
    scales = []
    update = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda self, step: (scales.append(self.step.lr_scale), update(self, step)))
    folder, summary = small.run()
    assert scales == [0.5] * summary["steps"] and "learning rate x0.5: half of it" in folder.log.read_text()


def test_a_flag_is_red_on_a_terminal(
    small: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("gates.G2.normalised.passes=[0.1, 0.2]", "gates.G2.normalised.warns=[0.1, 0.2]", "trainer.max_steps=3")
    execute(small.plan("display.progress=plain", *options), [])
    plain = capsys.readouterr().out
    assert "red flag: G2" in plain and "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    execute(small.plan("display.progress=plain", "seed_init=1", *options), [])
    shown = [line for line in capsys.readouterr().out.splitlines() if "red flag" in line]
    assert len(shown) == 1 and shown[0].startswith("\x1b[1;31m")


# ---- settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gates.on_fail.G1=crash", r"gates\.on_fail\.G1 must be warn or stop, got 'crash'"),
        ("gates.G2.reading=calibrated", r"gates\.G2\.reading must be normalised or specified, got 'calibrated'"),
        ("gates.G3_5.reading=x", r"gates\.G3_5\.reading must be calibrated or specified"),
        ("gates.G4.grad_ratio.passes=[3]", r"gates\.G4\.grad_ratio\.passes must be two numbers \[low, high\], got \[3"),
        ("gates.G4.grad_ratio.passes=[3, 0.3]", r"gates\.G4\.grad_ratio\.passes must be two numbers"),
        ("gates.G4.grad_ratio.passes=[.nan, 1]", r"gates\.G4\.grad_ratio\.passes must be two numbers"),
        ("gates.G4.grad_ratio.passes=[0.05, 3]", r"gates\.G4\.grad_ratio: passes=.* must lie inside warns=\[0\.1, 10"),
        ("gates.G3_5.cosine.warns=[-1, 0.9]", r"gates\.G3_5\.cosine: passes=.* must lie inside"),
        ("gates.G3.steps=0", r"gates\.G3\.steps must be at least 1, got 0"),
        ("gates.G4.every=0", r"gates\.G4\.every must be at least 1, got 0"),
        ("gates.G3_5.least_variance=-1", r"gates\.G3_5\.least_variance must be at least 0"),
        ("gates.G4.evry=5", r"unknown key 'gates\.G4\.evry'; did you mean 'gates\.G4\.every'\?"),
    ],
)
def test_bad_settings(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        config(override)
    assert "\n" not in str(error.value)


def test_identity_holds_what_can_stop_a_run() -> None:
    base = identity(config())
    assert base["gates"] == {"G0": {"on_fail": "stop"}, "G1": {"on_fail": "stop"}}
    assert identity(config("gates.G4.every=7", "gates.G2.reading=specified")) == base
    stops = identity(config("gates.on_fail.G4=stop"))
    assert stops != base and stops != identity(config("gates.on_fail.G4=stop", "gates.G4.every=7"))
    assert (
        identity(config("gates=off"))["gates"] == {} == identity(config("gates=off", "gates.on_fail.G4=stop"))["gates"]
    )
