"""Sweeps whose runs train as one where only seeds and learning rates differ: the same records, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid.run import PlannedRun
from sweeps.grouping import group_alike, group_overrides
from tests.runs import Setting, cli, results, rows, strict_json

pytestmark = pytest.mark.usefixtures("one_thread")

TOGETHER = "trainer.seeds_together=3"
ARMS = ["fusion=gain,gated", "seed_init=0,1,2", "seed_data=0", "sweep.name=s"]


def records(root: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: strict_json(path.read_text()) for path in sorted(root.glob("*/summary.json"))}


def plans(small: Setting, *each: tuple[str, ...]) -> list[PlannedRun]:
    return [small.plan("variant=x", "sweep.name=s", *overrides) for overrides in each]


def test_runs_that_differ_by_seeds_are_grouped(small: Setting) -> None:
    runs = plans(
        small,
        ("fusion=gain", "seed_init=0", TOGETHER),
        ("fusion=gated", "seed_init=0", TOGETHER),
        ("fusion=gain", "seed_init=1", "seed_data=1", TOGETHER),
        ("fusion=gain", "seed_init=2", TOGETHER),
        ("fusion=gain", "seed_init=3", TOGETHER),
        ("fusion=gain", "seed_init=0", "optim.lr=0.5", "optim.mamba_lr_mult=2", TOGETHER),
        ("fusion=gain", "seed_init=0", "optim.weight_decay=0.5", TOGETHER),
    )
    assert group_alike(runs, list(range(7))) == [[0, 2, 3], [4, 5], [1], [6]]
    assert group_alike(runs, [1, 4, 2]) == [[1], [4, 2]]
    alone = plans(small, ("seed_init=0",), ("seed_init=1",))
    assert group_alike(alone, [0, 1]) == [[0], [1]]  # on the CPU one by one unless asked


def test_the_overrides_of_a_group(small: Setting) -> None:
    runs = plans(small, ("seed_init=4",), ("seed_init=5", "seed_data=6"))
    lines = ["fusion=gain", "seed_init=4", "seed_data=0"]
    assert group_overrides(lines, runs) == [
        "fusion=gain",
        "+sweep.together=[{variant:x,seed_init:4,seed_data:0,optim:{},init:{}},{variant:x,seed_init:5,seed_data:6,optim:{},init:{}}]",
    ]
    assert group_overrides(lines, runs[:1]) == lines
    runs = plans(small, ("optim.lr=0.5", "optim.eps=1e-6"), ("optim.lr=0.25", "optim.eps=1e-6"))
    assert group_overrides(["optim.lr=0.5", "optim.eps=1e-6"], runs) == [
        "optim.eps=1e-6",
        "+sweep.together=[{variant:x,seed_init:0,seed_data:0,optim:{lr:0.5},init:{}},"
        "{variant:x,seed_init:0,seed_data:0,optim:{lr:0.25},init:{}}]",
    ]


def test_two_draws_of_the_initial_values_together_are_as_each_alone(small: Setting) -> None:
    axes = ["init.stream=null,1", "seed_init=0,1", "seed_data=0", "sweep.name=s"]
    assert cli(small.with_(*axes, "trainer.seeds_together=4"), "-m").code == 0
    assert cli(small.with_(*axes, f"out={small.out}/alone"), "-m").code == 0
    found, expected = records(small.out / "s"), records(small.out / "alone" / "s")
    assert found.keys() == expected.keys() and len(found) == 4
    assert {record["environment"]["members"] for record in found.values()} == {4}
    for name, record in found.items():
        assert record["final_val_loss"] == pytest.approx(expected[name]["final_val_loss"], rel=2e-3)
        assert set(expected[name]["overrides"]) - set(record["overrides"]) == {f"out={small.out}/alone"}
    assert len({round(record["final_val_loss"], 6) for record in found.values()}) == 4


def test_learning_rates_together_are_as_each_alone(small: Setting) -> None:
    axes = ["fusion=gain", "seed_init=0,1", "sweep.name=s", "optim.lr=1e-2,1e-3", "optim.mamba_lr_mult=0.25,1"]
    schedule = ["schedule=linear", "schedule.min_lr_ratio=0"]  # the last learning rate is zero for all
    assert cli(small.with_(*axes, *schedule, "trainer.seeds_together=8"), "-m").code == 0
    assert cli(small.with_(*axes, *schedule, f"out={small.out}/alone"), "-m").code == 0
    found, expected = records(small.out / "s"), records(small.out / "alone" / "s")
    assert found.keys() == expected.keys() and len(found) == 8
    assert {record["environment"]["members"] for record in found.values()} == {8}
    for name, record in found.items():
        assert record["variant"] == expected[name]["variant"]
        for ours, theirs in zip(rows(small.out / "s" / name), rows(small.out / "alone" / "s" / name), strict=True):
            for key in ("loss", "val_loss", "grad_norm", "lr", "lr_mamba", "lr_rwkv"):
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], rel=2e-3), (name, theirs["step"], key)
    assert len({round(record["final_val_loss"], 4) for record in found.values()}) == 8


def test_a_sweep_together_has_the_records_of_one_by_one(small: Setting) -> None:
    answer = cli(small.with_(*ARMS, TOGETHER), "-m")
    assert (answer.code, answer.err) == (0, "") and "6 of 6 runs have a record" in answer.out
    assert "run 1/6 gain seed 0: step 12/12" in answer.out and "run 6/6 gated seed 2: step 12/12" in answer.out
    found = records(small.out / "s")
    alone = cli(small.with_(*ARMS, f"out={small.out}/alone"), "-m")
    assert alone.code == 0
    expected = records(small.out / "alone" / "s")
    assert found.keys() == expected.keys() and len(found) == 6  # the same identities
    for name, record in found.items():
        assert record["environment"]["members"] == 3 and expected[name]["environment"]["members"] == 1
        assert set(record["overrides"]) - {TOGETHER} == {
            line for line in expected[name]["overrides"] if not line.startswith("out=")
        } | {f"out={small.out}"}
        ours, theirs = results(record), results(expected[name])
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, rel=2e-3) if isinstance(value, float) else value), key
        assert [row["step"] for row in rows(small.out / "s" / name)] == [
            row["step"] for row in rows(small.out / "alone" / "s" / name)
        ]
    again = cli(small.with_(*ARMS), "-m")
    assert "6 already done" in again.out


def test_what_is_missing_is_trained_together(small: Setting) -> None:
    assert cli(small.with_("fusion=gain", "seed_init=1", "seed_data=0", "sweep.name=s"), "-m").code == 0
    answer = cli(small.with_("fusion=gain", "seed_init=0,1,2", "seed_data=0", "sweep.name=s", TOGETHER), "-m")
    assert answer.code == 0 and "1 already done" in answer.out
    members = {record["seed_init"]: record["environment"]["members"] for record in records(small.out / "s").values()}
    assert members == {0: 2, 1: 1, 2: 2}


def test_what_fails_together_is_tried_alone(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    original = Trainer._update

    def update(self: Trainer, step: int) -> None:
        if step == 5 and any(member.cfg.seed_init == 1 for member in self.members):
            raise RuntimeError("out of luck")
        original(self, step)

    monkeypatch.setattr(Trainer, "_update", update)
    answer = cli(small.with_("fusion=gain", "seed_init=0,1,2", "sweep.name=s", TOGETHER), "-m")
    assert answer.code == 1 and "1 of 3 runs failed" in answer.err
    status = {record["seed_init"]: record["status"] for record in records(small.out / "s").values()}
    assert status == {0: "completed", 1: "failed", 2: "completed"}


def test_an_interrupted_group_goes_on(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    command = small.with_("fusion=gain", "seed_init=0,1", "sweep.name=s", TOGETHER)
    original = Trainer._update

    def update(self: Trainer, step: int) -> None:
        if step == 8:
            raise KeyboardInterrupt
        original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        assert cli(command, "-m").code == 130
    assert not records(small.out / "s")
    answer = cli(command, "-m")
    assert answer.code == 0 and answer.out.count("resumes after step 6") == 2
    whole = cli([*command, f"out={small.out}/whole"], "-m")
    assert whole.code == 0
    for name, record in records(small.out / "s").items():
        assert results(record) == results(records(small.out / "whole" / "s")[name])
