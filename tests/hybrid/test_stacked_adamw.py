"""AdamW on stacked leaves against PyTorch's on every member alone.

``test_triton_interpreted.py`` runs this file a second time, in Triton's interpreter, where the kernels serve.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn as nn

from hybrid import build_model, kernels
from hybrid.schema import OptimConfig
from hybrid.training.stacked_adamw import StackedAdamW, update_backend
from hybrid.training.step import PlainStep, StackStep
from tests.hybrid.either_form import backend_for
from tests.hybrid.stacked_update import Problem, check, problem
from tests.runs import Setting

pytestmark = pytest.mark.usefixtures("one_thread")

BACKEND = backend_for("cpu")
SIZES = [1, 300, 1024, 2500, 1040]  # a block of the kernels has 1024 numbers
ATTENTION = ("model.pattern=A A",)  # no recurrences: their kernels are slow to interpret


def optim(**changes: Any) -> OptimConfig:
    # A large eps, so that its place in the formula matters.
    return OptimConfig(**{"lr": 1e-2, "weight_decay": 0.5, "grad_clip": 0.3, "eps": 1e-3} | changes)


def trained(given: Problem, steps: int | None = None) -> tuple[list, StackedAdamW]:
    leaves = given.leaves()
    optimizer = StackedAdamW(leaves, given.cfg, BACKEND)
    for gradients, lrs in list(zip(given.gradients, given.lrs, strict=True))[:steps]:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.values.grad = gradient
        optimizer.step(lrs)
    return leaves, optimizer


CASES = {
    "decay and clipping": {},
    "no decay": {"weight_decay": 0.0},
    "no clipping": {"grad_clip": 0.0},
    "never reached": {"grad_clip": 1e6},
    "long memory": {"betas": [0.95, 0.9999], "eps": 1e-8},
    "no memory": {"betas": [0.0, 0.0]},
}


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_every_member_has_an_adamw_of_its_own(case: str, members: int) -> None:
    given = problem(optim(**CASES[case]), members, SIZES, steps=8)
    check(given, *trained(given))


def test_gradients_of_zero_and_learning_rates_of_zero() -> None:
    given = problem(optim(), 3, [700, 20], steps=6)
    given.lrs[:, :, 1] = 0
    given.lrs[2, 0] = 0
    for gradients in given.gradients:
        gradients[0][0] = gradients[1][0] = 0  # nothing of member 0
        gradients[0][2] = 0
    leaves, optimizer = trained(given)
    check(given, leaves, optimizer)
    assert all(leaf.values[1].equal(x[1]) for leaf, x in zip(leaves, given.start, strict=True))
    assert (leaves[0].values[0] != given.start[0][0]).all()  # decayed
    assert leaves[1].values[0].equal(given.start[1][0])  # neither gradient nor decay


def test_a_leaf_without_a_gradient_has_one_of_zero() -> None:
    given = problem(optim(), 2, [700, 20], steps=1)
    leaves = given.leaves()
    optimizer = StackedAdamW(leaves, given.cfg, "torch")
    leaves[0].values.grad = given.gradients[0][0]
    optimizer.step(given.lrs[0])
    assert leaves[1].values.equal(given.start[1])  # not decayed either: its part is no matrix
    assert (leaves[0].values != given.start[0]).all() and leaves[1].values.grad.count_nonzero() == 0


def test_members_that_are_not_finite_leave_the_others_alone() -> None:
    given = problem(optim(), 3, [1500, 20], steps=3)
    expected, _ = trained(given)
    spoilt = copy.deepcopy(given)
    spoilt.gradients[1][1][0, 7] = torch.nan
    spoilt.gradients[1][0][2, 5] = torch.inf  # a factor of 0, so the others of this member stay as they are
    found, _ = trained(spoilt)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.values[0].isnan().all() and ours.values[1].equal(theirs.values[1])
    assert found[0].values[2].isnan().nonzero().tolist() == [[5]]


def test_gradients_stay_and_nothing_depends_on_chance() -> None:
    given = problem(optim(), 2, SIZES, steps=4)
    before = copy.deepcopy(given.gradients)
    first, second = trained(given)[0], trained(given)[0]
    assert all(one.values.equal(other.values) for one, other in zip(first, second, strict=True))
    for step, kept in zip(given.gradients, before, strict=True):
        assert all(one.equal(other) for one, other in zip(step, kept, strict=True))


def test_gradients_that_are_not_side_by_side() -> None:
    given = problem(optim(), 2, [1500, 20], steps=3)
    given.gradients = [[g.t().contiguous().t() for g in step] for step in given.gradients]
    assert not given.gradients[0][0].is_contiguous()
    given.lrs = given.lrs.transpose(1, 2).contiguous().transpose(1, 2)
    check(given, *trained(given))


# ---- in steps of training


def steps_of(small: Setting, *overrides: str, seeds: tuple[int, ...] = (0, 1)) -> StackStep:
    """A stacked step of runs that differ by seeds and learning rates."""
    runs = [small.plan(f"seed_init={s}", f"seed_data={s}", f"optim.lr={0.003 * (s + 1)}", *overrides) for s in seeds]
    for run in runs:
        run.cfg.kernels.wkv6 = BACKEND  # says what serves the update
    return StackStep([run.cfg for run in runs], [build_model(run.cfg) for run in runs], runs[0].corpus)


OPTIONS = ("optim.weight_decay=0.5", "optim.grad_clip=0.3", "trainer.grad_accum=2")


def test_norms_losses_and_weights_are_the_plain_steps(small: Setting) -> None:
    stacked = steps_of(small, *ATTENTION, *OPTIONS)
    assert update_backend(stacked.cfg) == BACKEND
    plain = [PlainStep(cfg, build_model(cfg), stacked.corpus) for cfg in stacked.cfgs]
    for number in range(1, 9):
        stacked.run(number)
        for k, step in enumerate(plain):
            step.run(number)
            norms, expected = stacked.norms_by_part(k), step.norms_by_part(0)
            assert norms == pytest.approx(expected, rel=1e-3) and norms["grad_norm"] > 0.3
    # The two forwards round differently, and Adam's first steps are signs: as in ``test_stack.near``.
    for k, (losses, step) in enumerate(zip(stacked.losses(), plain, strict=True)):
        assert losses == pytest.approx(step.losses()[0], rel=1e-4)
        theirs = step.model.state_dict()
        for name, weight in stacked.stack.models[k].state_dict().items():
            assert (weight - theirs[name]).norm() < 1e-3 * theirs[name].norm() + 1e-6, name


def saved(step: StackStep, member: int) -> tuple[dict, dict]:
    """Weights and optimiser state as a checkpoint file brings them back."""
    file = io.BytesIO()
    torch.save((step.stack.models[member].state_dict(), step.optimizer_state(member)), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_update_goes_on_bit_by_bit(small: Setting) -> None:
    whole, first, second = (steps_of(small, *ATTENTION, *OPTIONS) for _ in range(3))
    for number in range(1, 8):
        whole.run(number)
        if number < 5:
            first.run(number)
    for k in range(2):
        weights, state = saved(first, k)
        assert {key: tuple(x.shape) for key, x in state["state"][0].items()} == {
            "step": (),
            "exp_avg": (1, first.stack.leaves[0].values.shape[1]),
            "exp_avg_sq": (1, first.stack.leaves[0].values.shape[1]),
        }
        second.stack.models[k].load_state_dict(weights)
        second.load_optimizer_state(k, state)
    for number in range(5, 8):
        second.run(number)
    for ours, theirs in zip(second.stack.leaves, whole.stack.leaves, strict=True):
        assert ours.values.equal(theirs.values)
    moved = [b.values[0].equal(a.values[0]) for a, b in zip(whole.stack.leaves, first.stack.leaves, strict=True)]
    assert not any(moved)


def test_a_state_that_torchs_own_step_wrote_is_taken(small: Setting) -> None:
    """Checkpoints from before the update had kernels of its own."""
    step = steps_of(small, *ATTENTION)
    groups = [
        dict(group, params=[nn.Parameter(group["params"][0][:1].clone())]) for group in step.optimizer.param_groups
    ]
    old = torch.optim.AdamW([{k: v for k, v in g.items() if k not in ("fused", "capturable")} for g in groups])
    for _ in range(3):
        for group in old.param_groups:
            group["params"][0].grad = torch.randn_like(group["params"][0])
        old.step()
    step.load_optimizer_state(1, old.state_dict())
    for leaf, group in zip(step.stack.leaves, old.param_groups, strict=True):
        mine, theirs = step.optimizer.state[leaf.values], old.state[group["params"][0]]
        assert mine["step"].item() == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert mine[name][1].equal(theirs[name][0]) and not mine[name][0].any()


def test_what_serves_follows_the_recurrences_kernels(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def serving(device: str, wkv6: str, ssd: str) -> str:
        cfg = small.config(f"kernels.wkv6={wkv6}", f"kernels.ssd={ssd}")
        cfg.trainer.device = device
        return update_backend(cfg)

    assert serving("cpu", "auto", "auto") == "torch"
    assert serving("cuda", "torch", "torch") == serving("cuda:1", "torch", "torch") == "torch"
    for installed in ({"triton": True, "fla": True, "mamba_ssm": False}, {"triton": True, "fla": False}):
        monkeypatch.setattr(kernels, "_INSTALLED", {"mamba_ssm": False} | installed)
        assert serving("cuda:1", "auto", "auto") == serving("cuda", "torch", "triton") == "triton"
    monkeypatch.setattr(kernels, "_INSTALLED", dict.fromkeys(kernels._INSTALLED, False))
    assert serving("cuda", "auto", "auto") == "torch"
