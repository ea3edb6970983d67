"""Mamba-2's short convolution against PyTorch's own in float64: outputs and every gradient.

``test_triton_interpreted.py`` runs this file a second time, in Triton's interpreter, where the kernels serve.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.kernels import causal_conv, conv_backend
from tests.hybrid.either_form import backend_for, on_devices
from tests.hybrid.recurrences import with_gaps
from tests.hybrid.test_kernels import relative_error

# B, T, C, K: single steps, more steps than a program has, channels that fill no program, other filter lengths
SHAPES = [(2, 1, 8, 4), (1, 3, 20, 4), (2, 70, 140, 4), (3, 33, 16, 2), (2, 64, 384, 4), (2, 9, 8, 5)]
DEVICES = on_devices(cpu=1e-6, cuda=1e-6, half=1e-2)


def inputs(shape: tuple[int, ...], dtype: str, device: str, models: int = 1) -> list[Tensor]:
    """x as a slice of something wider, as the projection gives it; weight; bias; the outputs' weights in a sum."""
    B, T, C, K = shape
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(models, *s, generator=generator) for s in ((B, T, C + 9), (C, K), (C,), (B, T, C))]
    wide = draws[0].to(getattr(torch, dtype))
    return [x.squeeze(0).to(device) for x in (wide[..., 5 : 5 + C], *draws[1:])]


def expected(x: Tensor, weight: Tensor, bias: Tensor, share: Tensor, past: Tensor | None = None) -> list[Tensor]:
    x, weight, bias = (t.detach().cpu().double().requires_grad_() for t in (x, weight, bias))
    K = weight.shape[1]
    before = torch.zeros(x.shape[0], K - 1, x.shape[2], dtype=torch.double) if past is None else past.cpu().double()
    padded = torch.cat((before, x), dim=1).transpose(1, 2)
    y = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))).transpose(1, 2)
    return [y, *torch.autograd.grad((y * share.cpu().double()).sum(), (x, weight, bias))]


def check(shape: tuple[int, ...], device: str, dtype: str, tolerance: float) -> None:
    x, weight, bias, share = inputs(shape, dtype, device)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = causal_conv(*leaves, backend=backend_for(device))
    assert y.dtype == x.dtype
    found = [y, *torch.autograd.grad((y.float() * share).sum(), leaves)]
    for one, wanted in zip(found, expected(x, weight, bias, share), strict=True):
        assert relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape: tuple[int, ...], device: str, dtype: str, tolerance: float) -> None:
    check(shape, device, dtype, tolerance)


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("form", ["transposed", "expanded"])
def test_gradients_that_are_not_dense(form: str, device: str, dtype: str, tolerance: float) -> None:
    x, weight, bias, _ = inputs((2, 20, 12, 4), dtype, device)
    if form == "transposed":
        share = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(8)).to(device).transpose(1, 2)
    else:
        share = torch.ones((), device=device).expand(2, 20, 12)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = causal_conv(*leaves, backend=backend_for(device))
    found = torch.autograd.grad(y, leaves, share.to(y.dtype))
    for one, wanted in zip(found, expected(x, weight, bias, share.to(y.dtype))[1:], strict=True):
        assert relative_error(one, wanted) < tolerance


def test_a_past_stands_before_the_first_step() -> None:
    x, weight, bias, share = inputs((2, 20, 12, 4), "float32", "cpu")
    whole = expected(x, weight, bias, share)[0]
    leaves = [t.detach().requires_grad_() for t in (x[:, 7:], weight, bias, x[:, 4:7])]
    second = causal_conv(*leaves, backend=backend_for("cpu"))
    assert relative_error(second, whole[:, 7:]) < 1e-6
    share = torch.cat((torch.zeros_like(share[:, :7]), share[:, 7:]), dim=1)
    _, dx, dweight, dbias = expected(x, weight, bias, share)
    found = torch.autograd.grad((second * share[:, 7:]).sum(), leaves)
    for one, wanted in zip(found, (dx[:, 7:], dweight, dbias, dx[:, 4:7]), strict=True):
        assert relative_error(one, wanted) < 1e-6


def test_low_precision_is_summed_in_that_of_the_filters() -> None:
    x, weight, bias, share = inputs((2, 20, 12, 4), "bfloat16", "cpu")
    y = causal_conv(x, weight, bias, backend="torch")
    assert y.dtype == torch.bfloat16 and relative_error(y, expected(x, weight, bias, share)[0]) < 3e-3


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_stacked_models_have_their_own_filters(device: str, dtype: str, tolerance: float) -> None:
    x, weight, bias, share = inputs((2, 40, 12, 4), dtype, device, models=3)
    leaves = [t.requires_grad_() for t in (x.detach(), with_gaps(weight), with_gaps(bias))]
    y = torch.vmap(lambda *own: causal_conv(*own, backend=backend_for(device)))(*leaves)
    found = [y, *torch.autograd.grad((y.float() * share).sum(), leaves)]
    for member in range(3):
        wanted = expected(x[member], weight[member], bias[member], share[member])
        for one, alone in zip(found, wanted, strict=True):
            assert relative_error(one[member], alone) < tolerance


@pytest.mark.parametrize("shapes", [((2, 5, 8), (7, 4), (8,)), ((2, 5, 8), (8, 4), (7,)), ((5, 8), (8, 4), (8,))])
def test_wrong_shapes_are_named(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, weight, bias = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"causal_conv needs x \[B,T,C\].*got x \["):
        causal_conv(x, weight, bias, backend=backend_for("cpu"))


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one step, got T=0"):
        causal_conv(torch.ones(2, 0, 8), torch.ones(8, 4), torch.ones(8), backend=backend_for("cpu"))


def test_a_past_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a past of \[2, 3, 8\], got \[2, 4, 8\]"):
        past = torch.ones(2, 4, 8)
        causal_conv(torch.ones(2, 5, 8), torch.ones(8, 4), torch.ones(8), past, backend=backend_for("cpu"))


@pytest.mark.parametrize(
    ("ssd", "device", "width", "serves"),
    [
        ("triton+mamba_ssm", "cuda", 4, "triton"),
        ("triton", "cuda", 2, "triton"),
        ("triton+mamba_ssm", "cuda", 5, "torch"),
        ("torch", "cuda", 4, "torch"),
        ("auto", "cpu", 4, "torch"),
    ],
)
def test_what_serves(ssd: str, device: str, width: int, serves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid.kernels._INSTALLED", {"triton": True, "fla": True, "mamba_ssm": True})
    assert conv_backend(ssd, device, width) == serves
