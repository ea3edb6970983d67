"""Optimiser groups, learning-rate schedule, gradient norms, clipping and accumulation."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hybrid.data import Corpus
from hybrid.schema import Config, OptimConfig, ScheduleConfig, TrainerConfig
from hybrid.training.optimizer import GradientNorms, build_optimizer, decays, group_of, set_lr
from hybrid.training.schedule import lr_factor
from tests.hybrid.trainers import model_of, stir, trainer_of
from tests.runs import Setting, rows

pytestmark = pytest.mark.usefixtures("one_thread")


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
    before = {name: parameter.detach().clone() for name, parameter in trainer.members[0].model.named_parameters()}
    trainer.train()
    moved = {
        group_of(name)
        for name, parameter in trainer.members[0].model.named_parameters()
        if not parameter.equal(before[name])
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
    trainer.step.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append({group["name"]: group["lr"] for group in optimizer.param_groups})
    )
    trainer.train()
    expected = [0.005, 0.01, 0.01, 0.005, 0.0]
    logged = [row for row in rows(trainer.members[0].folder) if row["kind"] == "train"]
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
    tight.step.optimizer.register_step_pre_hook(
        lambda *_: used.append(torch.stack([p.grad.norm() for p in tight.members[0].model.parameters()]).norm().item())
    )
    tight.train()
    assert used == [pytest.approx(1e-3, rel=1e-3)]
    assert next(row for row in rows(tight.members[0].folder) if row["kind"] == "train")["grad_norm"] > 0.1


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
        stir(trainer.members[0].model)
        trainer.step.optimizer.register_step_pre_hook(
            lambda *_, trainer=trainer, micro=micro: gradients.__setitem__(
                micro, [parameter.grad.clone() for parameter in trainer.members[0].model.parameters()]
            )
        )
        trainer.train()
        logged[micro] = next(row for row in rows(trainer.members[0].folder) if row["kind"] == "train")
    for micro in (2, 1):
        for one, many in zip(gradients[8], gradients[micro], strict=True):
            assert (one - many).norm() <= 1e-5 * one.norm() + 1e-9
        for key in ("loss", "grad_norm", "grad_ratio", "tokens"):
            assert logged[micro][key] == pytest.approx(logged[8][key], rel=1e-5)
