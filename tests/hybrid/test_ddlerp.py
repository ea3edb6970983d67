"""RWKV-6's token shift and projections against their formula in float64: outputs and every gradient.

``test_triton_interpreted.py`` runs this file a second time, in Triton's interpreter, where the kernels serve.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hybrid.kernels import MIXES, ddlerp_backend, ddlerp_linear
from tests.hybrid.either_form import INTERPRETED, backend_for, on_devices
from tests.hybrid.recurrences import with_gaps
from tests.hybrid.test_kernels import relative_error

# B, T, D, R: single steps, sizes that fill no tile, more tiles than one program of the sums takes
SHAPES = [(2, 1, 16, 16), (3, 21, 20, 5), (2, 70, 64, 32), (1, 33, 192, 32), (4, 96, 32, 16)]
DEVICES = on_devices(cpu=1e-6, cuda=1e-5, half=1e-2)
NAMES = ("x", "delta", "low", "weight", "bias", *(f"projection {k}" for k in range(MIXES)))
WIDTHS = (32, 5, 16, 60, 17)  # of the projections


def inputs(
    shape: tuple[int, ...], dtype: str, device: str, models: int = 1, turned: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments, ``low``, ``weight`` and projections in ``dtype``, and the outputs' weights in a sum.

    ``turned`` projections lie column by column.
    """
    B, T, D, R = shape
    generator = torch.Generator().manual_seed(3)
    sizes = ((B, T, D), (B, T, D), (B, T, MIXES * R), (D, MIXES * R), (MIXES, D), *((n, D) for n in WIDTHS))
    draws = [torch.randn(models, *size, generator=generator) for size in sizes]
    draws[3] /= R**0.5
    for i in (2, 3, *range(5, 5 + MIXES)):
        draws[i] = draws[i].to(getattr(torch, dtype))
    if turned:
        draws[5:] = [p.mT.contiguous().mT for p in draws[5:]]
    shares = [torch.randn(models, B, T, n, generator=generator) for n in WIDTHS]
    return tuple([x.squeeze(0).to(device) for x in some] for some in (draws, shares))


def summed(ys: Sequence[Tensor], shares: list[Tensor]) -> Tensor:
    return sum((y * share.to(y)).sum() for y, share in zip(ys, shares, strict=True))


def expected(values: list[Tensor], shares: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, mix by mix of the formula."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in values]
    x, delta, low, weight, bias, *projections = leaves
    R = low.shape[2] // MIXES
    mixes = [low[..., k * R : (k + 1) * R] @ weight[:, k * R : (k + 1) * R].T + bias[k] for k in range(MIXES)]
    ys = [(x + delta * m) @ p.T for m, p in zip(mixes, projections, strict=True)]
    return [*ys, *torch.autograd.grad(summed(ys, shares), leaves)]


def computed(leaves: list[Tensor], device: str) -> tuple[Tensor, ...]:
    *values, p0, p1, p2, p3, p4 = leaves
    return ddlerp_linear(*values, [p0, p1, p2, p3, p4], backend=backend_for(device))


def held_against(values: list[Tensor], shares: list[Tensor], device: str, tolerance: float) -> None:
    leaves = [t.detach().requires_grad_() for t in values]
    ys = computed(leaves, device)
    shares = [share.to(y.dtype) for share, y in zip(shares, ys, strict=True)]
    found = [*ys, *torch.autograd.grad(summed(ys, shares), leaves)]
    for name, one, wanted in zip((*"01234", *NAMES), found, expected(values, shares), strict=True):
        assert relative_error(one, wanted) < tolerance, name


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape: tuple[int, ...], device: str, dtype: str, tolerance: float) -> None:
    values, shares = inputs(shape, dtype, device)
    held_against(values, shares, device, tolerance)


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("width", [16, 144], ids=["with the projections", "alone"])
def test_programs_of_many_tiles(
    width: int, device: str, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program sums over all steps of a mix, the last tile of which is not full."""
    if device == "cuda" or INTERPRETED:
        from hybrid.kernels import ddlerp_linear_triton, ddlerp_triton

        monkeypatch.setattr(ddlerp_triton, "BUSY", 1)
        monkeypatch.setattr(ddlerp_linear_triton, "PROGRAMS", 1)
    values, shares = inputs((3, 50, width, 16), dtype, device)
    held_against(values, shares, device, tolerance)


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_projections_that_lie_column_by_column(device: str, dtype: str, tolerance: float) -> None:
    values, shares = inputs((2, 70, 64, 32), dtype, device, turned=True)
    held_against(values, shares, device, tolerance)


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_projections_of_which_one_lies_otherwise(device: str, dtype: str, tolerance: float) -> None:
    values, shares = inputs((2, 20, 64, 16), dtype, device, turned=True)
    values[6] = values[6].contiguous()
    held_against(values, shares, device, tolerance)


@pytest.mark.skipif(not INTERPRETED, reason="kernels serve in Triton's interpreter alone")
@pytest.mark.parametrize(
    "width, outputs, dtype, together",
    [
        (128, 128, "float16", True),
        (144, 32, "float16", False),
        (64, 144, "float16", False),
        (64, 64, "float32", True),
        (80, 64, "float32", False),
    ],
)
def test_what_is_one_kernel_with_the_projections(
    width: int, outputs: int, dtype: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.kernels import ddlerp_linear_triton, ddlerp_triton

    served = []
    for module, name in ((ddlerp_linear_triton, "ddlerp_linear_triton"), (ddlerp_triton, "ddlerp_triton")):
        serve = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=serve, n=name: served.append(n) or f(*args))
    values, _ = inputs((1, 3, width, 16), dtype, "cpu")
    values[7] = torch.randn(outputs, width)  # in float32 whatever the others are in
    assert [y.shape[-1] for y in computed(values, "cpu")] == [p.shape[0] for p in values[5:]]
    assert served == ["ddlerp_linear_triton" if together else "ddlerp_triton"]


@pytest.mark.skipif(not INTERPRETED, reason="kernels serve in Triton's interpreter alone")
def test_lower_precision_is_that_of_the_low_rank_activations() -> None:
    """As autocast makes them: the residual stream and weights in float32. Gradients are in their inputs' precision."""
    values, shares = inputs((2, 20, 16, 16), "float32", "cpu")
    values[2] = values[2].half()
    leaves = [t.requires_grad_() for t in values]
    ys = computed(leaves, "cpu")
    assert all(y.dtype == torch.float16 for y in ys)
    found = torch.autograd.grad(summed(ys, shares), leaves)
    shares = [share.half() for share in shares]
    for leaf, one, wanted in zip(leaves, found, expected(values, shares)[MIXES:], strict=True):
        assert one.dtype == leaf.dtype and relative_error(one, wanted) < 3e-3


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_one_output_alone(device: str, dtype: str, tolerance: float) -> None:
    values, shares = inputs((2, 20, 16, 16), dtype, device)
    leaves = [t.detach().requires_grad_() for t in values]
    y = computed(leaves, device)[3]
    only = [share * (k == 3) for k, share in enumerate(shares)]
    only[3] = only[3].to(y.dtype)
    found = torch.autograd.grad((y * only[3]).sum(), leaves, materialize_grads=True)
    for one, wanted in zip(found, expected(values, only)[MIXES:], strict=True):
        assert relative_error(one, wanted) < tolerance


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("turned", [False, True])
def test_stacked_models_have_their_own_weights(turned: bool, device: str, dtype: str, tolerance: float) -> None:
    values, shares = inputs((2, 20, 16, 16), dtype, device, models=3)
    gaps = [with_gaps(x) for x in values[3:5]]
    gaps += [with_gaps(x.mT).mT if turned else with_gaps(x) for x in values[5:]]
    leaves = [t.requires_grad_() for t in (*values[:3], *gaps)]
    ys = torch.vmap(lambda *own: computed(list(own), device))(*leaves)
    shares = [share.to(y.dtype) for share, y in zip(shares, ys, strict=True)]
    found = [*ys, *torch.autograd.grad(summed(ys, shares), leaves)]
    for member in range(3):
        wanted = expected([t[member] for t in values], [share[member] for share in shares])
        for one, alone in zip(found, wanted, strict=True):
            assert relative_error(one[member], alone) < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name: str) -> None:
    values, _ = inputs((2, 5, 16, 16), "float32", "cpu")
    at = NAMES.index(name)
    values[at] = values[at][..., :-1]
    with pytest.raises(ValueError, match=r"ddlerp_linear needs .*got .*\["):
        computed(values, "cpu")


def test_projections_that_are_missing_are_counted() -> None:
    values, _ = inputs((2, 5, 16, 16), "float32", "cpu")
    with pytest.raises(ValueError, match=r"needs 5 projections \[width,16\], got \[32, 16\]$"):
        ddlerp_linear(*values[:5], values[5:6], backend=backend_for("cpu"))


def test_no_step_is_refused() -> None:
    values, _ = inputs((2, 5, 16, 16), "float32", "cpu")
    with pytest.raises(ValueError, match="at least one step, got T=0"):
        computed([x[:, :0] if i < 3 else x for i, x in enumerate(values)], "cpu")


@pytest.mark.parametrize(
    ("wkv6", "device", "width", "rank", "outputs", "dtype", "serves"),
    [
        ("triton+fla", "cuda", 128, 32, 128, "bfloat16", "triton fused"),
        ("triton", "cuda", 64, 64, 64, "float32", "triton fused"),
        ("triton+fla", "cuda", 128, 32, 128, "float32", "triton"),
        ("triton+fla", "cuda", 128, 32, 256, "bfloat16", "triton"),
        ("triton", "cuda", 256, 64, 64, "bfloat16", "triton"),
        ("triton+fla", "cuda", 320, 32, 64, "bfloat16", "torch"),
        ("triton+fla", "cuda", 128, 96, 64, "bfloat16", "torch"),
        ("torch", "cuda", 128, 32, 64, "bfloat16", "torch"),
        ("auto", "cpu", 128, 32, 64, "float32", "torch"),
    ],
)
def test_what_serves(
    wkv6: str, device: str, width: int, rank: int, outputs: int, dtype: str, serves: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("hybrid.kernels._INSTALLED", {"triton": True, "fla": True, "mamba_ssm": True})
    assert ddlerp_backend(wkv6, device, width, rank, outputs, getattr(torch, dtype)) == serves
