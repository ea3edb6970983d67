"""The gated norms behind the recurrences against their formulas in float64: outputs and every gradient.

``test_triton_interpreted.py`` runs this file a second time, in Triton's interpreter, where the kernels serve.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid.kernels import gate_then_norm, norm_backend, norm_then_gate
from tests.hybrid.either_form import backend_for, on_devices
from tests.hybrid.recurrences import with_gaps
from tests.hybrid.test_kernels import relative_error

EPS = 1e-2  # large, so that a wrong place for it shows
# B, T, groups, channels of one: single steps, sizes that fill no tile, more rows than a tile, a norm of all channels
SHAPES = [(2, 1, 1, 16), (3, 7, 4, 5), (2, 70, 2, 32), (1, 9, 1, 300), (2, 150, 4, 16)]
DEVICES = on_devices(cpu=2e-6, cuda=2e-6, half=1e-2)
KINDS = ["norm then gate", "gate then norm"]


def inputs(kind: str, shape: tuple[int, ...], dtype: str, device: str, models: int = 1) -> list[Tensor]:
    """x, the gate as a slice of something wider, weight, bias if there is one; last the outputs' weights in a sum."""
    B, T, groups, width = shape
    C = groups * width
    generator = torch.Generator().manual_seed(7)
    sizes = [(B, T, C), (B, T, C + 9), (C,), (C,), (B, T, C)]
    draws = [torch.randn(models, *size, generator=generator) for size in sizes]
    draws[0], wide = ((2 * draw + 0.5).to(getattr(torch, dtype)) for draw in draws[:2])
    draws[1] = wide[..., 5 : 5 + C]
    if kind == "gate then norm":
        del draws[3]
    return [x.squeeze(0).to(device) for x in draws]


def expected(kind: str, values: list[Tensor], groups: int, share: Tensor) -> list[Tensor]:
    """Output and gradients by the formulas, a group at a time."""
    x, gate, *own = leaves = [t.detach().cpu().double().requires_grad_() for t in values]
    opened = gate / (1 + torch.exp(-gate))
    s = x * opened if kind == "gate then norm" else x
    normed = []
    for part in s.chunk(groups, dim=-1):
        if kind == "norm then gate":
            part = part - part.mean(-1, keepdim=True)
        normed.append(part / (part.pow(2).mean(-1, keepdim=True) + EPS).sqrt())
    y = torch.cat(normed, -1) * own[0]
    if kind == "norm then gate":
        y = (y + own[1]) * opened
    return [y, *torch.autograd.grad((y * share.cpu().double()).sum(), leaves)]


def call(kind: str, values: list[Tensor], groups: int, device: str) -> Tensor:
    function = norm_then_gate if kind == "norm then gate" else gate_then_norm
    return function(*values, groups=groups, eps=EPS, backend=backend_for(device))


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind: str, shape: tuple[int, ...], device: str, dtype: str, tolerance: float) -> None:
    *values, share = inputs(kind, shape, dtype, device)
    leaves = [t.detach().requires_grad_() for t in values]
    y = call(kind, leaves, shape[2], device)
    assert y.dtype == values[1].dtype
    share = share.to(y.dtype)
    found = [y, *torch.autograd.grad((y * share).sum(), leaves)]
    for one, wanted in zip(found, expected(kind, values, shape[2], share), strict=True):
        assert relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_not_dense(kind: str, device: str, dtype: str, tolerance: float) -> None:
    """A gradient whose steps lie before its batch, and one that is the same everywhere."""
    *values, share = inputs(kind, (2, 20, 2, 16), dtype, device)
    leaves = [t.detach().requires_grad_() for t in values]
    y = call(kind, leaves, 2, device)
    same = torch.ones((), device=device, dtype=y.dtype).expand(y.shape)
    for given in (share.to(y.dtype).transpose(0, 1).contiguous().transpose(0, 1), same):
        found = torch.autograd.grad(y, leaves, given, retain_graph=True)
        for one, wanted in zip(found, expected(kind, values, 2, given)[1:], strict=True):
            assert relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_models_have_their_own_weights(kind: str, device: str, dtype: str, tolerance: float) -> None:
    *values, share = inputs(kind, (2, 150, 2, 16), dtype, device, models=3)  # of each more rows than a tile has
    leaves = [t.detach().requires_grad_() for t in (*values[:2], *map(with_gaps, values[2:]))]
    y = torch.vmap(lambda *own: call(kind, list(own), 2, device))(*leaves)
    share = share.to(y.dtype)
    found = [y, *torch.autograd.grad((y * share).sum(), leaves)]
    for member in range(3):
        wanted = expected(kind, [t[member] for t in values], 2, share[member])
        for one, alone in zip(found, wanted, strict=True):
            assert relative_error(one[member], alone) < tolerance


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES[:2])
@pytest.mark.parametrize("kind", KINDS)
def test_several_gradients_of_models_with_one_input(kind: str, device: str, dtype: str, tolerance: float) -> None:
    """The backward operator is mapped as well; x and the last parameter are those of all models."""
    *values, share = inputs(kind, (2, 20, 2, 16), dtype, device, models=2)
    dims = (None, *(0 for _ in values[1:-1]), None)
    leaves = [(t if dim == 0 else t[0]).detach().requires_grad_() for t, dim in zip(values, dims, strict=True)]
    y = torch.vmap(lambda *own: call(kind, list(own), 2, device), in_dims=dims)(*leaves)
    weights = torch.tensor([[1.0, 1.0], [0.5, -1.0]], device=device)
    found = torch.autograd.grad((y * share).sum((1, 2, 3)), leaves, weights, is_grads_batched=True)
    own = [
        expected(kind, [t if dim is None else t[m] for t, dim in zip(leaves, dims, strict=True)], 2, share[m])[1:]
        for m in (0, 1)
    ]
    for one, dim, *alone in zip(found, dims, *own, strict=True):
        for row, weight in zip(one, weights.cpu().double(), strict=True):
            parts = [w * gradient for w, gradient in zip(weight, alone, strict=True)]
            assert relative_error(row, torch.stack(parts) if dim == 0 else sum(parts)) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [0, 1, 2, -1])
def test_wrong_shapes_are_named(wrong: int, kind: str) -> None:
    *values, _ = inputs(kind, (2, 5, 2, 16), "float32", "cpu")
    values[wrong] = values[wrong][..., :-1]
    with pytest.raises(ValueError, match=rf"{kind.replace(' ', '_')} needs x and gate \[B,T,C\].*got x \["):
        call(kind, values, 2, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_to_divide_the_channels(kind: str) -> None:
    *values, _ = inputs(kind, (2, 5, 2, 16), "float32", "cpu")
    with pytest.raises(ValueError, match="3 groups that divide C"):
        call(kind, values, 3, "cpu")


@pytest.mark.parametrize("function, own", [(norm_then_gate, 2), (gate_then_norm, 1)])
def test_an_eps_of_zero_is_refused(function: Callable, own: int) -> None:
    x, weight = torch.ones(2, 5, 32), torch.ones(32)
    with pytest.raises(ValueError, match="needs an eps above 0, got 0"):
        function(x, x, *[weight] * own, groups=2, eps=0.0)


@pytest.mark.parametrize(
    ("op", "backend", "device", "width", "serves"),
    [
        ("wkv6", "triton+fla", "cuda", 32, "triton"),
        ("ssd", "triton", "cuda", 512, "triton"),
        ("ssd", "triton+mamba_ssm", "cuda", 513, "torch"),
        ("wkv6", "torch", "cuda", 32, "torch"),
        ("ssd", "auto", "cpu", 256, "torch"),
    ],
)
def test_what_serves(
    op: str, backend: str, device: str, width: int, serves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.kernels._INSTALLED", {"triton": True, "fla": True, "mamba_ssm": True})
    assert norm_backend(op, backend, device, width) == serves
