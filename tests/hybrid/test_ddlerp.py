"""RWKV-6's token shift against its formula in float64: outputs and every gradient.

``test_triton_interpreted.py`` runs this file a second time, in Triton's interpreter, where the kernels serve.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid.kernels import MIXES, ddlerp, ddlerp_backend
from tests.hybrid.either_form import INTERPRETED, backend_for, on_devices
from tests.hybrid.recurrences import with_gaps
from tests.hybrid.test_kernels import relative_error

# B, T, D, R: single steps, sizes that fill no tile, more tiles than one program of the sums takes
SHAPES = [(2, 1, 16, 16), (3, 21, 20, 5), (2, 70, 64, 32), (1, 33, 192, 32), (4, 96, 32, 16)]
DEVICES = on_devices(cpu=1e-6, cuda=1e-5, half=1e-2)
NAMES = ("x", "delta", "low", "weight", "bias")


def inputs(shape: tuple[int, ...], dtype: str, device: str, models: int = 1) -> list[Tensor]:
    """The arguments, ``low`` and ``weight`` in ``dtype``, and the outputs' weights in a sum."""
    B, T, D, R = shape
    generator = torch.Generator().manual_seed(3)
    sizes = ((B, T, D), (B, T, D), (B, T, MIXES * R), (D, MIXES * R), (MIXES, D), (MIXES, B, T, D))
    draws = [torch.randn(models, *size, generator=generator) for size in sizes]
    draws[3] /= R**0.5
    for i in (2, 3):
        draws[i] = draws[i].to(getattr(torch, dtype))
    return [x.squeeze(0).to(device) for x in draws]


def expected(values: list[Tensor], shares: Tensor) -> list[Tensor]:
    """Outputs [5,B,T,D] and gradients, step by step of the formula."""
    x, delta, low, weight, bias = (t.detach().cpu().double().requires_grad_() for t in values)
    R = low.shape[2] // MIXES
    mixes = [low[..., k * R : (k + 1) * R] @ weight[:, k * R : (k + 1) * R].T + bias[k] for k in range(MIXES)]
    y = torch.stack([x + delta * m for m in mixes])
    return [y, *torch.autograd.grad((y * shares.cpu().double()).sum(), (x, delta, low, weight, bias))]


def held_against(values: list[Tensor], shares: Tensor, device: str, tolerance: float) -> None:
    leaves = [t.detach().requires_grad_() for t in values]
    y = torch.stack(ddlerp(*leaves, backend=backend_for(device)))
    shares = shares.to(y.dtype)
    found = [y, *torch.autograd.grad((y * shares).sum(), leaves)]
    for name, one, wanted in zip(("y", *NAMES), found, expected(values, shares), strict=True):
        assert relative_error(one, wanted) < tolerance, name


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape: tuple[int, ...], device: str, dtype: str, tolerance: float) -> None:
    *values, shares = inputs(shape, dtype, device)
    held_against(values, shares, device, tolerance)


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_programs_of_many_tiles(device: str, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program sums over all steps of a mix, the last tile of which is not full."""
    if device == "cuda" or INTERPRETED:
        from hybrid.kernels import ddlerp_triton

        monkeypatch.setattr(ddlerp_triton, "BUSY", 1)
    *values, shares = inputs((3, 50, 16, 16), dtype, device)
    held_against(values, shares, device, tolerance)


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_one_output_alone(device: str, dtype: str, tolerance: float) -> None:
    *values, shares = inputs((2, 20, 16, 16), dtype, device)
    leaves = [t.detach().requires_grad_() for t in values]
    y = ddlerp(*leaves, backend=backend_for(device))[3]
    found = torch.autograd.grad((y * shares[3].to(y.dtype)).sum(), leaves)
    only = torch.zeros_like(shares)
    only[3] = shares[3].to(y.dtype)
    for one, wanted in zip(found, expected(values, only)[1:], strict=True):
        assert relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_stacked_models_have_their_own_weights(device: str, dtype: str, tolerance: float) -> None:
    *values, shares = inputs((2, 20, 16, 16), dtype, device, models=3)
    leaves = [t.requires_grad_() for t in (*values[:3], *map(with_gaps, values[3:]))]
    y = torch.stack(torch.vmap(lambda *own: ddlerp(*own, backend=backend_for(device)))(*leaves), dim=1)
    shares = shares.to(y.dtype)
    found = [y, *torch.autograd.grad((y * shares).sum(), leaves)]
    for member in range(3):
        wanted = expected([t[member] for t in values], shares[member])
        for one, alone in zip(found, wanted, strict=True):
            assert relative_error(one[member], alone) < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name: str) -> None:
    *values, _ = inputs((2, 5, 16, 16), "float32", "cpu")
    named = dict(zip(NAMES, values, strict=True))
    named[name] = named[name][..., :-1]
    with pytest.raises(ValueError, match=r"ddlerp needs .*got .*\["):
        ddlerp(**named, backend=backend_for("cpu"))


@pytest.mark.parametrize(
    ("wkv6", "device", "width", "rank", "serves"),
    [
        ("triton+fla", "cuda", 128, 32, "triton"),
        ("triton", "cuda", 256, 64, "triton"),
        ("triton+fla", "cuda", 320, 32, "torch"),
        ("triton+fla", "cuda", 128, 96, "torch"),
        ("torch", "cuda", 128, 32, "torch"),
        ("auto", "cpu", 128, 32, "torch"),
    ],
)
def test_what_serves(
    wkv6: str, device: str, width: int, rank: int, serves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.kernels._INSTALLED", {"triton": True, "fla": True, "mamba_ssm": True})
    assert ddlerp_backend(wkv6, device, width, rank) == serves
