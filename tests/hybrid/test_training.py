"""The training loop: what a run logs, keeps and repeats, what seeds change, how it ends."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid import build_model
from hybrid.data import Corpus
from hybrid.run import execute
from hybrid.training import checkpoint, member
from hybrid.training.evaluation import evaluate
from hybrid.training.loop import Trainer
from hybrid.training.step import PlainStep
from tests.hybrid.trainers import CPU, trainer_of
from tests.runs import Setting, results, rows, same_weights, strict_json, weights

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- a run


def test_loss_falls_on_real_text(small: Setting) -> None:
    folder, summary = small.run("trainer.max_steps=40", "trainer.eval_every=10", "optim.lr=0.01")
    losses = [row["val_loss"] for row in rows(folder) if row["kind"] == "eval"]
    assert len(losses) == 5
    assert losses[0] == pytest.approx(math.log(summary["data"]["vocab_size"]), abs=0.1)  # it starts knowing nothing
    assert losses[-1] < losses[0] - 0.9
    assert summary["final_val_loss"] == losses[-1] and summary["best_val_loss"] == min(losses)
    assert summary["final_train_loss"] < losses[0] - 0.5


def test_same_seeds_give_the_same_bits(small: Setting, shared: tuple[str, ...], tmp_path: Path) -> None:
    options = ["model.dropout=0.1", "trainer.grad_accum=2"]
    folder, summary = small.run(*options)
    other, again = small.run(*options, f"out={tmp_path}/other")
    assert folder.path.name == other.path.name and folder.path != other.path
    assert rows(folder) == rows(other)
    for name in ("final", "best"):
        assert same_weights(weights(folder, name), weights(other, name))
    assert results(summary) == results(again)


def test_what_is_logged_when(small: Setting) -> None:
    folder, summary = small.run("trainer.max_steps=8", "trainer.log_every=3", "trainer.eval_every=4")
    found = [(row["kind"], row["step"], row["tokens"]) for row in rows(folder)]
    assert found == [
        ("eval", 0, 0),
        ("train", 3, 384),
        ("eval", 4, 512),
        ("train", 6, 768),
        ("train", 8, 1024),
        ("eval", 8, 1024),
    ]
    assert summary["steps"] == 8 and summary["tokens"] == 8 * 4 * 32


def test_train_loss_of_an_evaluation_is_the_mean_since_the_last(small: Setting) -> None:
    folder, summary = small.run("trainer.max_steps=7", "trainer.log_every=1", "trainer.eval_every=4")
    found = rows(folder)
    losses = [row["loss"] for row in found if row["kind"] == "train"]
    evaluations = [row["train_loss"] for row in found if row["kind"] == "eval"]
    assert evaluations == [None, pytest.approx(sum(losses[:4]) / 4), pytest.approx(sum(losses[4:]) / 3)]
    assert summary["final_train_loss"] == evaluations[-1]


def test_summarys_gradient_ratio_is_the_mean_of_the_last_ten_logged(small: Setting) -> None:
    folder, summary = small.run("trainer.max_steps=12", "trainer.log_every=1")
    ratios = [row["grad_ratio"] for row in rows(folder) if row["kind"] == "train"]
    assert len(ratios) == 12 and summary["grad_ratio"] == pytest.approx(sum(ratios[-10:]) / 10)


def test_checkpoints_do_not_change_a_result(small: Setting, tmp_path: Path) -> None:
    folder, summary = small.run("model.dropout=0.1", "trainer.checkpoint_every=1")
    other, again = small.run("model.dropout=0.1", "trainer.checkpoint_every=1000", f"out={tmp_path}/other")
    assert rows(folder) == rows(other) and results(summary) == results(again)
    assert same_weights(weights(folder), weights(other))


def test_a_finished_run_keeps_its_weights_only(small: Setting) -> None:
    folder, _ = small.run()
    assert {path.name for path in folder.checkpoints.iterdir()} == {"best.safetensors", "final.safetensors"}


def test_best_weights_are_those_of_the_lowest_validation_loss(small: Setting) -> None:
    run = small.plan("optim.lr=3", "optim.grad_clip=0", "schedule.warmup_steps=0", "display.progress=off")
    summary = execute(run, [])
    losses = {row["step"]: row["val_loss"] for row in rows(run.folder) if row["kind"] == "eval"}
    assert summary["best_step"] == min(losses, key=losses.get) < 12  # it gets worse at this learning rate
    model = build_model(run.cfg)
    checkpoint.load_weights(model, run.folder.checkpoints / "best.safetensors")
    found = evaluate(model, run.corpus, 32, CPU, torch.float32)
    assert found.loss == summary["best_val_loss"] == losses[summary["best_step"]]
    checkpoint.load_weights(model, run.folder.checkpoints / "final.safetensors")
    assert evaluate(model, run.corpus, 32, CPU, torch.float32).loss == summary["final_val_loss"]


# ---- seeds


def batches(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The inputs and targets of every batch of a run of this trainer."""
    seen = []
    original = Corpus.train_batch

    def record(self: Corpus, seed: int, index: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        batch = original(self, seed, index, batch_size)
        seen.append(np.stack(batch))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "train_batch", record)
        trainer.train()
    return seen


def test_seeds_change_what_they_name_and_only_that(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ("trainer.max_steps=3", "trainer.grad_accum=2")
    base = trainer_of(small, *short)
    init = trainer_of(small, *short, "seed_init=1")
    data = trainer_of(small, *short, "seed_data=1")
    arm = trainer_of(small, *short, "fusion=gain", "model.rwkv.expand_k=1.0", "optim.lr=0.1")
    start = {
        name: copy.deepcopy(t.members[0].model.state_dict())
        for name, t in {"base": base, "init": init, "data": data}.items()
    }
    assert same_weights(start["base"], start["data"])
    random = ("embedding.weight", "blocks.0.ffn.up.weight", "blocks.0.rwkv.r_proj.linear.weight",
              "blocks.0.mamba.in_proj.weight", "blocks.0.mamba.dt_bias")  # fmt: skip
    for name in random:
        assert not start["base"][name].equal(start["init"][name]), name

    order = {
        name: batches(t, monkeypatch) for name, t in {"base": base, "init": init, "data": data, "arm": arm}.items()
    }
    assert len(order["base"]) == 3
    for name in ("init", "arm"):
        assert np.array_equal(order["base"], order[name]), name
    assert not any(np.array_equal(x, y) for x in order["base"] for y in order["data"])
    assert len({batch.tobytes() for batch in order["base"]}) == 3  # no batch comes twice


def test_dropout_follows_seed_init(small: Setting) -> None:
    options = ("model.dropout=0.3", "trainer.max_steps=1", "schedule.warmup_steps=0")
    weights = trainer_of(small, *options).members[0].model.state_dict()

    def loss(*more: str) -> float:
        trainer = trainer_of(small, *options, *more)
        trainer.members[0].model.load_state_dict(weights)
        trainer.train()
        return next(row["loss"] for row in rows(trainer.members[0].folder) if row["kind"] == "train")

    assert loss() == loss(f"out={small.out}2") != loss("seed_init=1")


# ---- a run that ends early


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(small: Setting) -> None:
    folder, summary = small.run("optim.lr=1e9", "optim.grad_clip=0", "schedule.warmup_steps=0")
    assert summary["status"] == "diverged"
    assert re.fullmatch(r"(training|validation) loss not finite at step \d+", summary["stop_reason"])
    assert 0 < summary["steps"] < 12
    written = strict_json((folder.path / "summary.json").read_text())
    assert written == summary and written["best_step"] == 0 and math.isfinite(written["best_val_loss"])
    last = rows(folder)[-1]  # read strictly: no NaN in the file
    assert last["step"] == summary["steps"] and (last["loss"] if last["kind"] == "train" else last["val_loss"]) is None
    assert summary["stop_reason"] in folder.log.read_text()
    assert {path.name for path in folder.checkpoints.iterdir()} == {"best.safetensors"}


def test_a_diverged_run_is_not_repeated(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("optim.lr=1e9", "optim.grad_clip=0", "schedule.warmup_steps=0")
    _, summary = small.run(*options)
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("it trains again"))
    assert small.run(*options)[1] == summary


def test_diverged_at_the_last_validation(small: Setting) -> None:
    """One update, too large: its own loss was fine, what it left is not."""
    folder, summary = small.run(
        "optim.lr=1e30", "optim.grad_clip=0", "schedule.warmup_steps=0", "trainer.max_steps=1", "trainer.eval_every=1"
    )
    assert (summary["status"], summary["stop_reason"]) == ("diverged", "validation loss not finite at step 1")
    assert [row["step"] for row in rows(folder)] == [0, 1, 1] and rows(folder)[-1]["val_loss"] is None


def test_divergence_is_dated_to_the_step_where_it_is_seen_at_the_latest_logged(
    small: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = PlainStep.update, []

    def spoil(self: PlainStep, inputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(inputs)
        loss = original(self, inputs, targets)
        return loss * math.nan if len(calls) == 4 else loss

    monkeypatch.setattr(PlainStep, "update", spoil)
    _, summary = small.run("trainer.log_every=6")
    assert summary["status"] == "diverged" and 4 <= summary["steps"] <= 6


# ---- the interface to the person


def test_evaluations_reach_the_log(small: Setting) -> None:
    folder, _ = small.run()
    log = folder.log.read_text()
    for step in (0, 6, 12):
        assert re.search(rf"^step +{step}/12 .*val \d\.\d{{4}}", log, re.MULTILINE), step
    assert re.search(r"RWKV/Mamba \d+\.\d\d", log)
    assert "kernels: {'wkv6': 'torch', 'ssd': 'torch', 'conv': 'torch', 'ddlerp': 'torch', " in log


def test_memory_and_speed_are_measured(small: Setting) -> None:
    folder, summary = small.run()
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for row in lines:
        assert row["wall_seconds"] >= 0
        if row["kind"] == "train":
            assert row["tokens_per_second"] > 0 and row["memory_bytes"] > 2**20
    walls = [row["wall_seconds"] for row in lines]
    assert walls == sorted(walls) and summary["wall_seconds"] >= walls[-1]


def test_tensorboard_option_writes_events(small: Setting) -> None:
    pytest.importorskip("tensorboard")
    folder, _ = small.run("trainer.tensorboard=true")
    assert list(folder.path.rglob("events.out.tfevents*"))


def test_ratio_window_is_ten() -> None:
    assert member.RATIO_WINDOW == 10
