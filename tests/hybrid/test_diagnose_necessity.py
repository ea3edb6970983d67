"""Branch necessity: what is replaced by what, against the same done by hand, and the control."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from hybrid.data import IGNORE
from hybrid.diagnostics.necessity import derangement, disturbed, mean_and_error, measure_necessity, push, replacements
from hybrid.diagnostics.substitutes import Fixed, substituted
from hybrid.diagnostics.windows import Windows
from hybrid.model import HybridLM
from hybrid.observed import places, recorded
from tests.hybrid.configs import stirred, tokens

CPU = torch.device("cpu")
STACKS = [
    ("model.pattern=P*2", "fusion=gated"),
    ("model.pattern='R P M'", "fusion=gain", "fusion.branch_norm=rms"),
    ("model.pattern=P*2", "model.branches=[rwkv,rwkv]", "fusion=concat"),
]


def windows_of(count: int, length: int = 12, batch_size: int = 4) -> Windows:
    text = tokens(count, length + 1)
    targets = text[:, 1:].clone()
    targets[-1, length // 2 :] = IGNORE  # as the last window of a split has it
    return Windows(text[:, :-1].contiguous(), targets, batch_size, CPU)


@torch.no_grad()
def loss(model: HybridLM, windows: Windows) -> float:
    """Nats per token, computed without any of the code under test."""
    logits = model(windows.tokens)
    return F.cross_entropy(logits.flatten(0, 1), windows.targets.flatten(), ignore_index=IGNORE).item()


@torch.no_grad()
def outputs_of(model: HybridLM, windows: Windows) -> dict:
    with recorded(model) as recording:
        model(windows.tokens)
    return dict(recording.outputs)


def mean_outputs(model: HybridLM, windows: Windows) -> dict:
    real = windows.targets != IGNORE
    return {place: out[real].mean(dim=0) for place, out in outputs_of(model, windows).items()}


def found(entries: list[dict], layer: int | None, branch: str, intervention: str) -> dict:
    (entry,) = (e for e in entries if (e["layer"], e["branch"], e["intervention"]) == (layer, branch, intervention))
    return entry


@pytest.mark.parametrize("overrides", STACKS)
def test_zero_is_what_a_model_without_the_output_matrix_loses(overrides):
    model, windows = stirred(*overrides), windows_of(6)
    entries = measure_necessity(model, windows, mean_outputs(model, windows))
    assert len(entries) == 3 * (len(places(model)) + len({name for _, name in places(model)}))
    for layer, branch in [*places(model), *((None, name) for name in dict(places(model)).values())]:
        without = copy.deepcopy(model)
        for place in places(model):
            if place[1] == branch and layer in (None, place[0]):
                module = getattr(without.blocks[place[0]], branch)
                (module.o_proj if branch.startswith("rwkv") else module.out_proj).weight.data.zero_()
        expected = loss(without, windows) - loss(model, windows)
        assert found(entries, layer, branch, "zero")["loss_increase"] == pytest.approx(expected, abs=2e-6)


def test_mean_and_shuffle_are_what_a_hook_puts_there():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(2)
    means, outputs = mean_outputs(model, windows), outputs_of(model, windows)
    entries = measure_necessity(model, windows, means)
    for intervention, value in {
        "mean": lambda place: means[place].expand_as(outputs[place]),
        "shuffle": lambda place: outputs[place].flip(0),  # of two windows, the other one
    }.items():
        for layers in ([0], [1], [0, 1]):
            hooks = []
            for i in layers:
                out = value((i, "mamba"))
                hooks.append(model.blocks[i].mamba.register_forward_hook(lambda *_, out=out: (out, None)))
            expected = loss(model, windows)
            for hook in hooks:
                hook.remove()
            layer = layers[0] if len(layers) == 1 else None
            entry = found(entries, layer, "mamba", intervention)
            assert entry["loss_increase"] == pytest.approx(expected - loss(model, windows), abs=2e-6)


def test_a_dead_branch_is_needed_by_nobody():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(6)
    for block in model.blocks:
        block.rwkv.o_proj.weight.data.zero_()
    for entry in measure_necessity(model, windows, mean_outputs(model, windows)):
        increases = (entry["loss_increase"], entry["control"], entry["standard_error"])
        if entry["branch"] == "rwkv":
            assert increases == (0.0, 0.0, 0.0)
        else:
            assert all(value != 0 for value in increases)


def test_a_constant_output_is_needed_but_its_text_is_not():
    model, windows = stirred("model.pattern=P", "fusion=gain"), windows_of(6)
    constant = torch.linspace(-1, 1, 16).expand(3, 12, 16)  # two batches of three
    with substituted(model, {(0, "rwkv"): Fixed(constant)}):
        entries = measure_necessity(model, windows, {(0, "rwkv"): constant[0, 0], (0, "mamba"): torch.zeros(16)})
    assert abs(found(entries, 0, "rwkv", "zero")["loss_increase"]) > 1e-3
    assert found(entries, 0, "rwkv", "mean")["loss_increase"] == 0
    assert found(entries, 0, "rwkv", "shuffle")["loss_increase"] == 0


def test_the_control_is_as_long_as_the_change_and_points_elsewhere():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(4)
    means, outputs = mean_outputs(model, windows), outputs_of(model, windows)
    inputs: dict[int, tuple] = {}
    for layer, block in enumerate(model.blocks):
        block.fusion.register_forward_pre_hook(lambda _, given, layer=layer: inputs.__setitem__(layer, given[:2]))
    with torch.no_grad(), recorded(model) as recording:
        model(windows.tokens)
    others = derangement(4, torch.Generator().manual_seed(3))
    targets = replacements(outputs, means, others)
    seen = 0
    random = torch.Generator().manual_seed(3)  # the same derangement comes first
    for trial, _ in disturbed(model, windows.tokens, windows.targets, recording, means, random):
        layer = trial.layer or 0  # of all layers, the first: what goes into the others is already disturbed
        own, other = inputs[layer] if trial.branch == "rwkv" else inputs[layer][::-1]
        before = outputs[layer, trial.branch]
        wanted = targets[layer, trial.branch][trial.intervention] - before
        if trial.control:
            moved = own - before
            assert torch.allclose(moved.norm(dim=-1), wanted.norm(dim=-1), rtol=1e-3)
            assert F.cosine_similarity(moved, wanted, dim=-1).abs().mean() < 0.4  # 0.2 for 16 dimensions at random
        else:
            assert torch.allclose(own, before + wanted, atol=1e-5)
        kept = outputs[layer, "mamba" if trial.branch == "rwkv" else "rwkv"]
        assert torch.equal(other, kept)
        seen += 1
    assert seen == 2 * 3 * (4 + 2)


def test_random_directions_have_no_preference():
    out, target = torch.zeros(50, 40, 8), torch.ones(50, 40, 8)
    moved = push(out, target, torch.Generator().manual_seed(0))
    assert torch.allclose(moved.norm(dim=-1), torch.full((50, 40), math.sqrt(8)))
    assert moved.mean(dim=(0, 1)).abs().max() < 0.1  # 2000 draws of size 1: about 0.02


def test_every_row_gets_another_one():
    for rows in (2, 3, 7):
        others = derangement(rows, torch.Generator().manual_seed(rows))
        assert sorted(others.tolist()) == list(range(rows))
        assert all(i != other for i, other in enumerate(others.tolist()))


def test_standard_error_over_windows():
    # Values 2 and 4 of equal weight: mean 3, sample deviation sqrt(2), over sqrt(2).
    assert mean_and_error(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0])) == pytest.approx((3.0, 1.0))
    # Windows of 3 tokens and 1 token, 1 nat per token each: no spread.
    assert mean_and_error(torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0])) == pytest.approx((1.0, 0.0))
    # Weights 3/4 and 1/4, values 0 and 4, mean 1: sqrt(2/1 * ((3/4)^2 1^2 + (1/4)^2 3^2)) = sqrt(9/4).
    assert mean_and_error(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 1.0])) == pytest.approx((1.0, 1.5))
    assert math.isnan(mean_and_error(torch.tensor([2.0]), torch.tensor([1.0]))[1])


def test_one_window_has_nothing_to_shuffle_with():
    model, windows = stirred("model.pattern=P", "fusion=gain"), windows_of(1)
    entries = measure_necessity(model, windows, mean_outputs(model, windows))
    shuffled = found(entries, 0, "rwkv", "shuffle")
    assert math.isnan(shuffled["loss_increase"])
    assert math.isfinite(found(entries, 0, "rwkv", "zero")["loss_increase"])


def test_the_model_is_as_it_was():
    model, windows = stirred("model.pattern=P*2", "fusion=gated"), windows_of(4)
    before, modules = loss(model, windows), list(model.named_modules())
    measure_necessity(model, windows, mean_outputs(model, windows))
    assert loss(model, windows) == before
    assert [(name, id(module)) for name, module in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
