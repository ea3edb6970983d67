"""The training loop and its parts: optimiser groups, schedule, gradient norms, evaluation, checkpoints, resuming."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hybrid import build_model
from hybrid.data import Corpus
from hybrid.progress import RunProgress
from hybrid.records import RunFolder
from hybrid.run import execute
from hybrid.schema import Config, OptimConfig, ScheduleConfig, TrainerConfig
from hybrid.training import checkpoint, loop
from hybrid.training.evaluation import evaluate
from hybrid.training.loop import Stop, Trainer
from hybrid.training.optimizer import GradientNorms, build_optimizer, decays, group_of, set_lr
from hybrid.training.schedule import lr_factor
from tests.runs import Killed, Setting, results, rows, same_weights, strict_json, weights

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(small: Setting, *overrides: str) -> nn.Module:
    return build_model(small.config("model.vocab_size=30", *overrides))


def trainer_of(small: Setting, *overrides: str) -> Trainer:
    """A trainer in a folder of its own, before its first step."""
    run = small.plan("display.progress=off", *overrides)
    run.folder.create(run.cfg, run.corpus)
    progress = RunProgress("test", run.cfg.trainer.max_steps, run.cfg.display, run.folder.note)
    return Trainer(run.cfg, run.corpus, run.folder, progress)


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move every parameter, because many start at zero and hide what they do."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


# ---- optimiser groups

# Arms that together have every kind of branch and fusion, and what a parameter's name shows of its group.
MODELS = [
    ("model.pattern='P R M A'", "fusion=gated"),
    ("model.pattern=P", "fusion=gain"),
    ("model.pattern=P", "fusion=weighted"),
    ("model.pattern=P", "fusion=gated_channel", "fusion.branch_norm=rms"),
    ("model.pattern=P", "fusion=concat"),
    ("model.pattern=P", "fusion=residual"),
    ("model.pattern=P", "fusion=cross_attention"),
    ("model.pattern=P", "model.branches=[rwkv,rwkv]", "fusion=gain"),
    ("model.pattern=P", "model.branches=[mamba,mamba]"),
]


@pytest.mark.parametrize("overrides", MODELS, ids=" ".join)
def test_every_parameter_is_in_the_one_group_that_its_name_says(small: Setting, overrides: tuple[str, ...]) -> None:
    model = model_of(small, *overrides)
    optim = OptimConfig(lr=1e-3, rwkv_lr_mult=2.0, mamba_lr_mult=0.5, fusion_lr_mult=3.0)
    optimizer = build_optimizer(model, optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: list[int] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen.append(id(parameter))
            found = re.match(r"blocks\.\d+\.(rwkv|mamba|fusion)(_[ab])?\.", names[id(parameter)])
            assert group["name"] == (found.group(1) if found else "other"), names[id(parameter)]
            assert group["lr"] == {"rwkv": 2e-3, "mamba": 5e-4, "fusion": 3e-3, "other": 1e-3}[group["name"]]
    assert sorted(seen) == sorted(names)  # each of them, and none twice


def test_gains_named_after_branches_are_the_fusions(small: Setting) -> None:
    names = {name: group_of(name) for name, _ in model_of(small, "fusion=gain").named_parameters()}
    gains = {name: group for name, group in names.items() if name.endswith("_gain")}
    assert gains == {"blocks.0.fusion.rwkv_gain": "fusion", "blocks.0.fusion.mamba_gain": "fusion"}


def test_a_set_factor_reaches_every_group_on_top_of_its_multiplier(small: Setting) -> None:
    optimizer = build_optimizer(model_of(small), OptimConfig(lr=1e-3, mamba_lr_mult=0.25))
    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.1)  # of the peak, not of the last
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"rwkv": 1e-4, "mamba": 2.5e-5, "fusion": 1e-4, "other": 1e-4}
    )


def test_weight_decay_shrinks_matrices_only_and_not_those_that_say_no(small: Setting) -> None:
    model = model_of(small, "fusion=gated", "model.pattern='P A'")
    stir(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that decay is all that a step does
    optimizer.step()
    shrunk = set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[name]):
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.2))
            shrunk.add(name)
    rwkv, mamba = "blocks.0.rwkv.", "blocks.0.mamba."
    assert shrunk == {
        "embedding.weight",
        *(f"blocks.{i}.ffn.{side}.weight" for i in (0, 1) for side in ("up", "down")),
        "blocks.1.attention.qkv_proj.weight", "blocks.1.attention.o_proj.weight",
        "blocks.0.fusion.gate.weight",
        mamba + "in_proj.weight", mamba + "out_proj.weight",
        *(rwkv + f"{name}_proj.linear.weight" for name in "rkvg"), rwkv + "o_proj.weight",
    }  # fmt: skip


def test_layers_flags_against_weight_decay_are_honoured(small: Setting) -> None:
    named = dict(model_of(small).named_parameters())
    flagged = ("mamba.dt_bias", "mamba.A_log", "mamba.D", "rwkv.bonus", "rwkv.x_bias")
    for name in flagged:
        parameter = named[f"blocks.0.{name}"]
        assert parameter._no_weight_decay and not decays(parameter), name
    assert named["blocks.0.rwkv.bonus"].ndim == named["blocks.0.rwkv.x_bias"].ndim == 2  # the flag is what decides
    matrix = nn.Parameter(torch.ones(2, 2))
    assert decays(matrix)
    matrix._no_weight_decay = True
    assert not decays(matrix)


def test_betas_and_eps_reach_the_optimizer(small: Setting) -> None:
    optimizer = build_optimizer(model_of(small), OptimConfig(betas=[0.8, 0.9], eps=1e-5))
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5 for group in optimizer.param_groups)


def test_a_multiplier_of_zero_freezes_its_part_and_no_other(small: Setting) -> None:
    trainer = trainer_of(small, "optim.mamba_lr_mult=0", "trainer.max_steps=4")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {
        group_of(name) for name, parameter in trainer.model.named_parameters() if not parameter.equal(before[name])
    }
    assert moved == {"rwkv", "fusion", "other"}


# ---- learning rate


def schedule(name: str, warmup: int, steps: int, lr: float = 1.0, **options: float) -> list[float]:
    """The learning rate of every update."""
    cfg = Config(optim=OptimConfig(lr=lr), trainer=TrainerConfig(max_steps=steps))
    cfg.schedule = ScheduleConfig(name=name, warmup_steps=warmup, **options)
    return [lr * lr_factor(step, cfg) for step in range(steps)]


def test_cosine() -> None:
    # 4 updates up, then half a cosine in 8 intervals from 1 to 0.1: 0.55 + 0.45 cos(k pi / 8).
    falling = [1, 0.9657457896, 0.8681980515, 0.7222075446, 0.55, 0.3777924554, 0.2318019485, 0.1342542104, 0.1]
    assert schedule("cosine", 4, 13) == pytest.approx([0.25, 0.5, 0.75, 1, *falling], abs=1e-9)


def test_linear() -> None:
    assert schedule("linear", 2, 7, lr=2.0, min_lr_ratio=0.2) == pytest.approx([1, 2, 2, 1.6, 1.2, 0.8, 0.4], abs=1e-12)


def test_constant() -> None:
    assert schedule("constant", 2, 5, lr=0.1) == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_last_update_is_at_min_lr(name: str) -> None:
    assert schedule(name, 3, 20, lr=3e-4, min_lr=6e-5)[-1] == pytest.approx(6e-5)
    assert schedule(name, 0, 20, lr=3e-4, min_lr_ratio=0.5)[-1] == pytest.approx(1.5e-4)
    assert schedule(name, 0, 20, lr=3e-4, min_lr=0.0)[-1] == 0
    assert schedule(name, 0, 20, lr=3e-4, min_lr=1e-5, min_lr_ratio=0.5)[-1] == pytest.approx(1e-5)  # a number wins


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_without_warmup_the_first_update_is_at_the_peak(name: str) -> None:
    assert schedule(name, 0, 10)[0] == 1
    assert schedule(name, 0, 1) == [1]


def test_the_optimizer_uses_what_the_schedule_says_and_the_log_tells_it(small: Setting) -> None:
    trainer = trainer_of(
        small, "schedule=linear", "schedule.warmup_steps=2", "schedule.min_lr=0", "optim.lr=0.01",
        "optim.rwkv_lr_mult=3", "trainer.max_steps=5", "trainer.log_every=1",
    )  # fmt: skip
    used: list[dict[str, float]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append({group["name"]: group["lr"] for group in optimizer.param_groups})
    )
    trainer.train()
    expected = [0.005, 0.01, 0.01, 0.005, 0.0]
    logged = [row for row in rows(trainer.folder) if row["kind"] == "train"]
    assert [lr["other"] for lr in used] == pytest.approx(expected)
    assert [lr["rwkv"] for lr in used] == pytest.approx([3 * lr for lr in expected])
    assert [row["lr"] for row in logged] == pytest.approx(expected)
    for key in ("rwkv", "mamba", "fusion", "other"):
        assert [row[f"lr_{key}"] for row in logged] == [lr[key] for lr in used]


# ---- gradient norms


class Toy(nn.Module):
    """Parameters with the names of a model's and gradients of known norms."""

    def __init__(self, **norms: list[float]) -> None:
        super().__init__()
        block = nn.Module()
        for part, values in norms.items():
            module = nn.Module()
            for i, value in enumerate(values):
                parameter = nn.Parameter(torch.zeros(2, 2))
                parameter.grad = torch.tensor([[0.6 * value, 0.0], [0.0, -0.8 * value]])
                module.register_parameter(f"w{i}", parameter)
            block.add_module(part, module)
        self.blocks = nn.ModuleList([block])


def test_both_gradient_ratios_by_hand() -> None:
    model = Toy(rwkv=[5.0, 12.0], mamba=[3.0, 4.0], fusion=[2.0], ffn=[6.0, 8.0], mix_norm=[24.0])
    norms = GradientNorms(model)
    row = norms.by_part(norms.clip(0.0))
    assert row == pytest.approx(
        {
            "grad_norm": math.sqrt(169 + 25 + 4 + 100 + 576),
            "grad_norm_rwkv": 13.0,
            "grad_norm_mamba": 5.0,
            "grad_norm_fusion": 2.0,
            "grad_norm_other": 26.0,
            "grad_ratio": 8.5 / 3.5,  # of the means of the tensors' norms
            "grad_ratio_total": 13.0 / 5.0,  # of the norms of all tensors together
        }
    )


@pytest.mark.parametrize("part", ["rwkv", "mamba"])
def test_no_ratio_without_both_parts(part: str) -> None:
    norms = GradientNorms(Toy(**{part: [1.0]}, ffn=[1.0]))
    assert norms.by_part(norms.clip(1.0)).keys() == {"grad_norm", f"grad_norm_{part}", "grad_norm_other"}


def test_a_vanished_or_missing_gradient_counts_as_zero() -> None:
    model = Toy(rwkv=[3.0, 4.0], mamba=[0.0])
    model.blocks[0].rwkv.w1.grad = None
    norms = GradientNorms(model)
    row = norms.by_part(norms.clip(1.0))
    assert row["grad_norm"] == pytest.approx(3.0)
    assert row["grad_ratio"] == pytest.approx(1.5 / 1e-9)  # finite, so that it can be averaged


def test_norms_that_are_not_finite_are_nan() -> None:
    model = Toy(rwkv=[math.inf], mamba=[1.0])
    norms = GradientNorms(model)
    row = norms.by_part(norms.clip(1.0))
    assert math.isnan(row["grad_norm"]) and math.isnan(row["grad_ratio"])
    assert row["grad_norm_mamba"] == pytest.approx(1.0)


def with_gradients(model: nn.Module) -> nn.Module:
    stir(model)
    tokens = torch.randint(0, 30, (2, 17), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return model


@pytest.mark.parametrize("max_norm", [0.01, 1e3])
def test_clipping_is_that_of_torch(small: Setting, max_norm: float) -> None:
    model = with_gradients(model_of(small))
    twin = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    expected_norm = nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
    assert 0.01 < expected_norm < 1e3  # one of the two cases clips, the other does not
    norms = GradientNorms(model).clip(max_norm)
    torch.testing.assert_close(norms.norm(), expected_norm)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_norms_of_a_real_model_and_no_clipping_at_zero(small: Setting) -> None:
    model = with_gradients(model_of(small, "model.pattern='P R'"))
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norms = GradientNorms(model)
    row = norms.by_part(norms.clip(0.0))
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())

    def norm(*parts: str) -> list[float]:
        return [g.double().norm().item() for name, g in before.items() if re.search(rf"\.({'|'.join(parts)})\.", name)]

    assert row["grad_norm"] == pytest.approx(math.hypot(*(g.double().norm().item() for g in before.values())), rel=1e-6)
    for part in ("rwkv", "mamba", "fusion"):
        assert row[f"grad_norm_{part}"] == pytest.approx(math.hypot(*norm(part)), rel=1e-6)
    means = {part: sum(norm(part)) / len(norm(part)) for part in ("rwkv", "mamba")}
    assert row["grad_ratio"] == pytest.approx(means["rwkv"] / means["mamba"], rel=1e-6)
    assert row["grad_ratio_total"] == pytest.approx(math.hypot(*norm("rwkv")) / math.hypot(*norm("mamba")), rel=1e-6)


def test_logged_norms_are_before_clipping_and_updates_after(small: Setting) -> None:
    tight = trainer_of(small, "optim.grad_clip=1e-3", "trainer.max_steps=1", "schedule.warmup_steps=0")
    used: list[float] = []
    tight.optimizer.register_step_pre_hook(
        lambda *_: used.append(torch.stack([p.grad.norm() for p in tight.model.parameters()]).norm().item())
    )
    tight.train()
    assert used == [pytest.approx(1e-3, rel=1e-3)]
    assert next(row for row in rows(tight.folder) if row["kind"] == "train")["grad_norm"] > 0.1


# ---- accumulation


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_micro_batches_add_up_to_the_large_batch(small: Setting, monkeypatch: pytest.MonkeyPatch, clip: float) -> None:
    whole = Corpus.train_batch

    def pieces(self: Corpus, seed: int, index: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch ``index`` of any size as the rows that follow those of the last one."""
        per_step = 8 // batch_size
        inputs, targets = whole(self, seed, index // per_step, 8)
        piece = slice(batch_size * (index % per_step), batch_size * (index % per_step + 1))
        return inputs[piece], targets[piece]

    monkeypatch.setattr(Corpus, "train_batch", pieces)
    gradients: dict[int, list[Tensor]] = {}
    logged = {}
    for micro, accumulate in ((8, 1), (2, 4), (1, 8)):
        trainer = trainer_of(
            small, f"trainer.batch_size={micro}", f"trainer.grad_accum={accumulate}", f"optim.grad_clip={clip}",
            "trainer.max_steps=1", "schedule.warmup_steps=0",
        )  # fmt: skip
        stir(trainer.model)
        trainer.optimizer.register_step_pre_hook(
            lambda *_, trainer=trainer, micro=micro: gradients.__setitem__(
                micro, [parameter.grad.clone() for parameter in trainer.model.parameters()]
            )
        )
        trainer.train()
        logged[micro] = next(row for row in rows(trainer.folder) if row["kind"] == "train")
    for micro in (2, 1):
        for one, many in zip(gradients[8], gradients[micro], strict=True):
            assert (one - many).norm() <= 1e-5 * one.norm() + 1e-9
        for key in ("loss", "grad_norm", "grad_ratio", "tokens"):
            assert logged[micro][key] == pytest.approx(logged[8][key], rel=1e-5)


# ---- evaluation


@pytest.fixture
def stirred(small: Setting) -> tuple[nn.Module, Corpus]:
    """A model of two fused blocks and one plain one in which every parameter matters, and its corpus."""
    run = small.plan("model.pattern='P R P'")
    model = build_model(run.cfg)
    stir(model)
    return model, run.corpus


def test_evaluation_is_the_mean_over_every_token_of_the_split(stirred: tuple[nn.Module, Corpus]) -> None:
    model, corpus = stirred
    found = evaluate(model, corpus, 7, CPU, torch.float32)
    nats, tokens = 0.0, torch.from_numpy(corpus.val.astype(np.int64))
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, corpus.seq_len):
            piece = tokens[start : start + corpus.seq_len + 1]
            logits = model(piece[None, :-1])[0].double()
            nats -= logits.log_softmax(-1)[torch.arange(len(piece) - 1), piece[1:]].sum().item()
    assert (len(tokens) - 1) % corpus.seq_len  # the last window is a part of one
    assert found.loss == pytest.approx(nats / (len(tokens) - 1), rel=1e-6)


def test_evaluation_depends_on_no_batch_size(small: Setting, stirred: tuple[nn.Module, Corpus]) -> None:
    model, corpus = stirred
    found = {size: evaluate(model, corpus, size, CPU, torch.float32) for size in (1, 3, 8, 1000)}
    for other in found.values():
        assert other.loss == pytest.approx(found[1].loss, rel=1e-6)
        assert other.bits_per_byte == pytest.approx(found[1].bits_per_byte, rel=1e-6)
        assert other.gate_mean == pytest.approx(found[1].gate_mean, rel=1e-6)
    first = [rows(small.run(f"trainer.batch_size={size}", "trainer.max_steps=3")[0])[0] for size in (1, 6)]
    assert first[0]["val_loss"] == first[1]["val_loss"]


def test_bits_per_byte_of_characters_of_many_bytes(small: Setting, tmp_path: Path) -> None:
    text = "".join("añ日😀 b"[i * i % 6] for i in range(3000))
    (tmp_path / "wide.txt").write_bytes(text.encode())
    run = small.plan(f"data.path={tmp_path}/wide.txt")
    found = evaluate(build_model(run.cfg), run.corpus, 8, CPU, torch.float32)
    predicted = text[2700 + 1 :]  # the validation split but its first character
    assert len(predicted.encode()) > 1.5 * len(predicted)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * len(predicted) / len(predicted.encode()))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(stirred: tuple[nn.Module, Corpus], training: bool) -> None:
    model, corpus = stirred
    model.train(training)
    rng = torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    evaluate(model, corpus, 8, CPU, torch.float32)
    assert all(module.training is training for module in model.modules())
    assert all(block.fusion.observer is None for block in model.blocks if hasattr(block, "fusion"))
    assert same_weights(before, model.state_dict()) and torch.equal(rng, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_that_fails_leaves_the_model_as_it_was(
    stirred: tuple[nn.Module, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = stirred
    model.train()
    monkeypatch.setattr(F, "cross_entropy", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, corpus, 8, CPU, torch.float32)
    assert model.training and model.blocks[0].fusion.observer is None


def test_evaluation_without_dropout(small: Setting) -> None:
    run = small.plan("model.dropout=0.5")
    model = build_model(run.cfg).train()
    losses = {evaluate(model, run.corpus, 8, CPU, torch.float32).loss for _ in range(2)}
    model.dropout.p = model.blocks[0].dropout.p = 0.0
    assert losses == {evaluate(model, run.corpus, 8, CPU, torch.float32).loss}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.pattern='P R P'", "fusion=gated", "fusion.gate_init=0.7"], [0.7, 0.7]),
        (["fusion=gated_channel", "fusion.gate_init=0.2"], [0.2]),
        (["fusion=weighted", "fusion.weight_init=0.6"], [0.6]),
        (["fusion=concat"], None),
        (["model.pattern=R"], None),
    ],
)
def test_gates_at_the_start_are_gate_init(small: Setting, overrides: list[str], expected: list[float] | None) -> None:
    run = small.plan(*overrides)
    found = evaluate(build_model(run.cfg), run.corpus, 8, CPU, torch.float32).gate_mean
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_mean_gates_are_those_of_the_text(stirred: tuple[nn.Module, Corpus]) -> None:
    model, corpus = stirred
    short = replace(corpus, val=corpus.val[:10])  # 9 predictions in a window of 32
    found = evaluate(model, short, 8, CPU, torch.float32).gate_mean
    expected = evaluate(model, replace(short, seq_len=9), 8, CPU, torch.float32).gate_mean
    assert found == pytest.approx(expected, rel=1e-5)


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
        name: copy.deepcopy(t.model.state_dict()) for name, t in {"base": base, "init": init, "data": data}.items()
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
    weights = trainer_of(small, *options).model.state_dict()

    def loss(*more: str) -> float:
        trainer = trainer_of(small, *options, *more)
        trainer.model.load_state_dict(weights)
        trainer.train()
        return next(row["loss"] for row in rows(trainer.folder) if row["kind"] == "train")

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
    original = Trainer._update

    def spoil(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
        loss, norms = original(self, step)
        return (loss * math.nan if step == 4 else loss), norms

    monkeypatch.setattr(Trainer, "_update", spoil)
    _, summary = small.run("trainer.log_every=6")
    assert summary["status"] == "diverged" and 4 <= summary["steps"] <= 6


# ---- stopping and resuming


def asked_at(step: int, number: int) -> Callable[[Trainer, int], tuple[Tensor, Tensor]]:
    """``Trainer._update`` during whose call for ``step`` the signal arrives."""
    original = Trainer._update

    def update(self: Trainer, current: int) -> tuple[Tensor, Tensor]:
        if current == step:
            os.kill(os.getpid(), number)
        return original(self, current)

    return update


@pytest.fixture(scope="module")
def reference(
    shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> tuple[RunFolder, dict[str, Any]]:
    """The small run with dropout, undisturbed."""
    out = tmp_path_factory.mktemp("reference")
    return Setting((*shared, f"out={out}"), out).run("model.dropout=0.1")


def assert_same_run(folder: RunFolder, summary: dict[str, Any], reference: tuple[RunFolder, dict[str, Any]]) -> None:
    assert results(summary) == results(reference[1])
    assert rows(folder) == rows(reference[0])
    for name in ("final", "best"):
        assert same_weights(weights(folder, name), weights(reference[0], name))
    assert {path.name for path in folder.checkpoints.iterdir()} >= {"best.safetensors", "final.safetensors"}
    assert not list(folder.checkpoints.glob("step-*"))


@pytest.mark.parametrize(
    ("step", "number"),
    [(1, signal.SIGINT), (3, signal.SIGINT), (5, signal.SIGTERM), (6, signal.SIGINT), (11, signal.SIGINT)],
)
def test_asked_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(
    small: Setting,
    reference: tuple[RunFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", asked_at(step, number))
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step}; the same command goes on from there"):
            small.run("model.dropout=0.1")
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = small.plan("model.dropout=0.1").folder
    assert folder.summary() is None
    assert [path.name for path in folder.checkpoints.glob("step-*")] == [f"step-{step:08d}"]
    folder, summary = small.run("model.dropout=0.1")
    assert_same_run(folder, summary, reference)
    assert f"resumes after step {step}" in folder.log.read_text()


def test_a_second_ctrl_c_acts_at_once() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(stop.asked)
        os.kill(os.getpid(), signal.SIGTERM)  # not a second Ctrl-C
        reached.append(stop.asked)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it goes on")
    assert reached == [True, True]


def test_asked_during_the_last_step_it_finishes_and_then_stops(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_update", asked_at(12, signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="this run is done"):
        small.run("model.dropout=0.1")
    monkeypatch.setattr(Trainer, "__init__", lambda *_: pytest.fail("it trains again"))
    assert_same_run(*small.run("model.dropout=0.1"), reference)


def test_resuming_exactly_at_the_end(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the last step is there, the record is not."""
    original = checkpoint.save_weights

    def die(model: nn.Module, path: Path) -> None:
        if path.name == "final.safetensors":
            raise Killed
        original(model, path)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", asked_at(12, signal.SIGINT))
        patch.setattr(checkpoint, "save_weights", die)
        with pytest.raises(Killed):
            small.run("model.dropout=0.1")
    monkeypatch.setattr(Trainer, "_update", lambda *_: pytest.fail("there is nothing left to train"))
    folder, summary = small.run("model.dropout=0.1")
    assert_same_run(folder, summary, reference)


def killed_at(small: Setting, step: int, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The folder of the small run with dropout, dead during ``step``."""
    original = Trainer._update

    def update(self: Trainer, current: int) -> tuple[Tensor, Tensor]:
        if current == step:
            raise Killed
        return original(self, current)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(Killed):
            small.run("model.dropout=0.1")
    return small.plan("model.dropout=0.1").folder


@pytest.mark.parametrize("torn", ['{"kind": "tr', '{"kind": "eval", "step": 9, "val_loss": 3.', "\n\n", "\0" * 40])
def test_resuming_over_a_torn_line(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    folder = killed_at(small, 8, monkeypatch)
    with folder.metrics.open("a") as handle:
        handle.write(torn)
    assert_same_run(*small.run("model.dropout=0.1"), reference)


def test_a_full_disk_costs_nothing_but_time(small: Setting, reference: tuple[RunFolder, dict[str, Any]]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (500, 2_000, 60_000):  # too small for the log, for the metrics, for the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with contextlib.suppress(OSError):
                assert small.run("model.dropout=0.1")[1]["status"] == "failed"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not small.plan("model.dropout=0.1").ended
    assert_same_run(*small.run("model.dropout=0.1"), reference)


def test_resuming_after_death_within_torch_save(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def half(content: dict[str, Any], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"PK\x03\x04 half a file")
            raise Killed
        original(content, path)

    original = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            small.run("model.dropout=0.1")
    folder = small.plan("model.dropout=0.1").folder
    assert {path.name for path in folder.checkpoints.iterdir()} >= {"step-00000003", "partial-00000006"}
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    assert not list(folder.checkpoints.glob("partial-*"))


class FileChanges:
    """Lists what changes a file below ``root``, and from change number ``last`` on lets nothing more happen.

    As after kill -9, whatever Python does on its way out reaches no file.
    """

    CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")

    def __init__(self) -> None:
        self.root: str | None = None
        sys.addaudithook(self._hook)  # for the life of the process; idle without a root

    @contextlib.contextmanager
    def watch(self, root: Path, last: int | None = None) -> Iterator[list[str]]:
        self.root, self.last = str(root), last
        self.seen: list[str] = []
        try:
            yield self.seen
        finally:
            self.root = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None or event not in self.CHANGES:
            return
        path = arguments[0]
        inside = isinstance(path, str | os.PathLike) and (str(path).startswith(self.root) or not os.path.isabs(path))
        if not inside or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.seen.append(f"{event} {Path(path).name}")
        if self.last is not None and len(self.seen) > self.last:
            raise Killed


class Deaths:
    """A short run, and what becomes of it after death before any of its changes to files."""

    def __init__(self, small: Setting, changes: FileChanges) -> None:
        short = ("trainer.max_steps=3", "trainer.eval_every=2", "trainer.checkpoint_every=1", "trainer.log_every=2")
        self.run, self.changes = small.plan("model.dropout=0.1", "display.progress=off", *short), changes
        self.run.folder.path.parent.mkdir(parents=True)  # not again with every death
        with changes.watch(self.run.folder.path) as self.list:
            summary = execute(self.run, [])
        self.expected = results(summary), rows(self.run.folder), weights(self.run.folder)

    def problem(self, last: int) -> str | None:
        """What is wrong with the run that died before change ``last`` and was started again; None if nothing is."""
        shutil.rmtree(self.run.folder.path)
        with contextlib.suppress(Killed), self.changes.watch(self.run.folder.path, last):
            execute(self.run, [])
            return f"{self.list[last]}: not reached"
        summary = execute(self.run, [])
        if summary["status"] != "completed":
            return f"{self.list[last]}: {summary['status']}, {summary['stop_reason']}"
        found = results(summary), rows(self.run.folder)
        if found != self.expected[:2] or not same_weights(weights(self.run.folder), self.expected[2]):
            return f"{self.list[last]}: other results"
        return None


@pytest.fixture(scope="module")
def file_changes() -> FileChanges:
    return FileChanges()


def test_killed_at_any_kind_of_change_to_a_file_it_resumes_to_the_same_bits(
    small: Setting, file_changes: FileChanges
) -> None:
    deaths = Deaths(small, file_changes)
    assert len(deaths.list) > 40
    last_of_kind = {re.sub(r"[\d]|\.[0-9a-f-]+\.tmp", "", kind): i for i, kind in enumerate(deaths.list)}
    assert len(last_of_kind) > 15
    assert [found for i in sorted(last_of_kind.values()) if (found := deaths.problem(i))] == []


@pytest.mark.slow
def test_killed_at_every_change_to_a_file_it_resumes_to_the_same_bits(
    small: Setting, file_changes: FileChanges
) -> None:
    deaths = Deaths(small, file_changes)
    assert [found for i in range(len(deaths.list)) if (found := deaths.problem(i))] == []


def test_killed_while_it_tidies_up_it_is_tidied_up_later(small: Setting, file_changes: FileChanges) -> None:
    deaths = Deaths(small, file_changes)
    last = max(i for i, change in enumerate(deaths.list) if change.startswith("os.remove "))
    assert deaths.problem(last) is None
    names = {path.name for path in deaths.run.folder.checkpoints.iterdir()}
    assert names == {"best.safetensors", "final.safetensors"}


def test_a_run_that_had_no_time_for_a_checkpoint_starts_over(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = killed_at(small, 2, monkeypatch)
    assert not list(folder.checkpoints.glob("step-*"))
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    assert "resumes" not in folder.log.read_text()


def test_the_newest_of_two_checkpoints_is_taken(
    small: Setting, reference: tuple[RunFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death came after the new one had its name and before the old one was gone, or half of it."""
    folder = killed_at(small, 8, monkeypatch)
    (newest,) = folder.checkpoints.glob("step-*")
    old = folder.checkpoints / "step-00000003"
    old.mkdir()
    (old / "training.pt").write_bytes(b"half gone")
    assert newest.name == "step-00000006"
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    log = folder.log.read_text()
    assert "resumes after step 6" in log and "cannot be read" not in log


def test_a_checkpoint_of_another_model_is_refused(small: Setting, tmp_path: Path) -> None:
    checkpoint.save_weights(model_of(small), tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.partial").exists()
    with pytest.raises(RuntimeError):
        checkpoint.load_weights(model_of(small, "fusion=gain"), tmp_path / "weights.safetensors")


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def scribble(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink])
def test_a_damaged_checkpoint_is_put_aside(
    small: Setting,
    reference: tuple[RunFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    damage: Callable[[Path], None],
) -> None:
    """As after a power cut. The run starts over, and gives what it would have given."""
    folder = killed_at(small, 8, monkeypatch)
    damage(folder.checkpoints / "step-00000006" / file)
    assert_same_run(*small.run("model.dropout=0.1"), reference)
    assert "step-00000006 cannot be read" in folder.log.read_text()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_a_checkpoint_that_cannot_be_read_just_now_is_kept(
    small: Setting, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = killed_at(small, 8, monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with contextlib.suppress(OSError):
            small.run("model.dropout=0.1")
    assert (folder.checkpoints / "step-00000006").exists()


def test_death_at_the_very_end_does_not_cost_the_whole_run(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_summary", die)
        with pytest.raises(Killed):
            small.run()
    steps = []
    original = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda self, step: steps.append(step) or original(self, step))
    small.run()
    assert len(steps) <= 3  # checkpoint_every


# ---- the interface to the person


def test_evaluations_reach_the_log(small: Setting) -> None:
    folder, _ = small.run()
    log = folder.log.read_text()
    for step in (0, 6, 12):
        assert re.search(rf"^step +{step}/12 .*val \d\.\d{{4}}", log, re.MULTILINE), step
    assert re.search(r"RWKV/Mamba \d+\.\d\d", log) and "kernels: {'wkv6': 'torch', 'ssd': 'torch'}" in log


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


@pytest.fixture(autouse=True)
def no_leftover_signal_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ratio_window_is_ten() -> None:
    assert loop.RATIO_WINDOW == 10
