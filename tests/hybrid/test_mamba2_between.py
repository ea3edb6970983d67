"""All that a Mamba-2 layer does between its products as one operator, against its formulas in float64.

It has no plain form: ``test_triton_interpreted.py`` runs what needs kernels in Triton's interpreter, and a GPU has it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid import kernels
from hybrid.branches.mamba2 import Mamba2
from hybrid.kernels import mamba2_backend, mamba2_between
from hybrid.schema import KernelsConfig, MambaConfig
from tests.hybrid.either_form import INTERPRETED, on_devices
from tests.hybrid.recurrences import ssd_reference, with_gaps
from tests.hybrid.test_kernels import relative_error

# B, T, inner, heads, groups, N, filter, fill: one step (of so many sequences that their sums are no differences of a
# few rounded numbers), one chunk, several, heads that fill no tile, groups, short filters, no fill and all there can be
SHAPES = [
    (16, 1, 32, 2, 1, 16, 4, 14),
    (2, 64, 64, 4, 1, 16, 4, 12),
    (1, 150, 32, 2, 1, 32, 4, 6),
    (2, 37, 40, 2, 1, 20, 3, 1),
    (1, 70, 64, 4, 2, 16, 2, 0),
    (1, 40, 36, 3, 3, 20, 4, 15),
]
# On a GPU most products of the recurrence are TF32 for float32: ten bits, which it cuts off.
DEVICES = on_devices(cpu=3e-6, cuda=1e-2, half=2e-2)
# The interpreter rounds float16 as a GPU does, bfloat16 not.
DEVICES = [DEVICES[0], pytest.param("cpu", "float16", 1e-2, id="cpu-half")] if INTERPRETED else DEVICES[1:]
NAMES = ("zxBCdt", "filters", "filter_bias", "dt_bias", "A_log", "D", "norm")


def inputs(shape: tuple[int, ...], dtype: str, device: str, models: int = 1) -> list[Tensor]:
    """The arguments, and the outputs' weights in a sum."""
    B, T, inner, H, G, N, K, fill = shape
    channels = inner + 2 * G * N
    generator = torch.Generator().manual_seed(2)
    sizes = ((B, T, inner + channels + H + fill), (channels, K), (channels,), (H,), (H,), (H,), (inner,), (B, T, inner))
    zxBCdt, *own, share = (torch.randn(models, *size, generator=generator) for size in sizes)
    own[2] = own[2] / 2 - 3  # step sizes of about 0.05
    # What a product of bfloat16 gives; NaN where nothing may be read.
    zxBCdt[..., zxBCdt.shape[-1] - fill :] = torch.nan
    return [t.squeeze(0).to(device) for t in (zxBCdt.to(getattr(torch, dtype)), *own, share)]


def expected(shape: tuple[int, ...], *arguments: Tensor) -> list[Tensor]:
    """The output and the gradients of all but the last argument, which is the output's weights in a sum."""
    _, _, inner, H, G, N, _, fill = shape
    leaves = [t.detach().cpu().double().requires_grad_() for t in arguments[:-1]]
    zxBCdt, filters, filter_bias, dt_bias, A_log, D, norm = leaves
    z, xBC, dt, _ = zxBCdt.split([inner, inner + 2 * G * N, H, fill], dim=-1)
    padded = F.pad(xBC.transpose(1, 2), (filters.shape[1] - 1, 0))
    convolved = F.silu(F.conv1d(padded, filters.unsqueeze(1), filter_bias, groups=len(filters))).transpose(1, 2)
    x, B, C = convolved.split([inner, G * N, G * N], dim=-1)
    x, B, C = x.unflatten(2, (H, -1)), B.unflatten(2, (G, N)), C.unflatten(2, (G, N))
    y, _ = ssd_reference(x, F.softplus(dt + dt_bias), -torch.exp(A_log), B, C, D)
    gated = (y.flatten(2) * F.silu(z)).unflatten(2, (G, -1))
    out = (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)).flatten(2) * norm
    return [out, *torch.autograd.grad((out * arguments[-1].cpu().double()).sum(), leaves)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    return {name: relative_error(a, b) for name, a, b in zip(("output", *NAMES), found, wanted, strict=True)}


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape: tuple[int, ...], device: str, dtype: str, tolerance: float) -> None:
    *arguments, share = inputs(shape, dtype, device)
    leaves = [t.requires_grad_() for t in arguments]
    out = mamba2_between(*leaves, shape[4], 1e-5)
    assert out.dtype == leaves[0].dtype
    found = [out, *torch.autograd.grad((out.float() * share).sum(), leaves)]
    wanted = expected(shape, *arguments, share)
    assert all(error < tolerance for error in errors(found, wanted).values()), errors(found, wanted)
    fill = found[1].shape[-1] - shape[-1]
    assert not found[1][..., fill:].any()


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_stacked_models_have_their_own_weights(device: str, dtype: str, tolerance: float) -> None:
    shape = (2, 40, 32, 2, 1, 16, 4, 14)
    zxBCdt, *own, share = inputs(shape, dtype, device, models=3)
    leaves = [t.requires_grad_() for t in (zxBCdt, *(with_gaps(t) for t in own))]
    out = torch.vmap(lambda *t: mamba2_between(*t, 1, 1e-5))(*leaves)
    found = [out, *torch.autograd.grad((out.float() * share).sum(), leaves)]
    for member in range(3):
        wanted = expected(shape, *(t[member] for t in leaves), share[member])
        alone = errors([t[member] for t in found], wanted)
        assert all(error < tolerance for error in alone.values()), alone


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
def test_steps_of_every_size(device: str, dtype: str, tolerance: float) -> None:
    """The softplus and its derivative keep their digits where steps are tiny, and where they are large."""
    shape = (1, 20, 32, 2, 1, 16, 4, 0)
    zxBCdt, *own, share = inputs(shape, dtype, device)
    zxBCdt[..., -2:] = torch.linspace(-14, 3, 20).to(zxBCdt.dtype)[:, None]
    zxBCdt[:, 7, -2:] = 25.0
    leaves = [t.requires_grad_() for t in (zxBCdt, *own)]
    out = mamba2_between(*leaves, 1, 1e-5)
    (found,) = torch.autograd.grad((out.float() * share).sum(), leaves[:1])
    wanted = expected(shape, *leaves, share)[1]
    assert relative_error(out, expected(shape, *leaves, share)[0]) < tolerance
    scale = wanted[..., -2:].abs()
    assert ((found.cpu().double()[..., -2:] - wanted[..., -2:]).abs() <= 30 * tolerance * scale + 1e-9).all()


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES[:1])
@pytest.mark.parametrize("place", ["zxBCdt", "dt_bias"])
def test_what_is_no_number_stays_none(place: str, device: str, dtype: str, tolerance: float) -> None:
    """A run that has failed is known by its loss."""
    shape = (1, 20, 32, 2, 1, 16, 4, 0)
    *arguments, _ = inputs(shape, dtype, device)
    arguments[NAMES.index(place)][..., -1] = torch.nan
    assert mamba2_between(*arguments, 1, 1e-5).isnan().any()


@pytest.mark.parametrize("device, dtype, tolerance", DEVICES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_gives_what_its_parts_give(groups: int, device: str, dtype: str, tolerance: float) -> None:
    """With somebody to observe the recurrence, or with a state, a layer goes through its parts."""
    layer = Mamba2(
        32, MambaConfig(head_dim=16, state_size=16, n_groups=groups), KernelsConfig(wkv6="torch", ssd="triton")
    ).to(device)  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    x, share = (torch.randn(1, 70, 32, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    leaves = [x, *layer.parameters()]

    def found(*state: object) -> list[Tensor]:
        # On a CPU float32: its kernels have no such products in half precision.
        with torch.autocast(device, enabled=dtype == "bfloat16"):
            out, _ = layer(x, *state)
        return [out, *torch.autograd.grad((out.float() * share).sum(), leaves)]

    assert layer.fused(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mamba2, "between", None)
        together = found()
    seen = []
    layer.observer = seen.append
    observed = found()
    layer.observer = None
    assert len(seen) == 1
    for name, *answers in zip(("output", "x", *dict(layer.named_parameters())), together, observed, strict=True):
        assert relative_error(*answers) < tolerance, name
    assert relative_error(together[0], found(layer.initial_state(1))[0]) < tolerance


def test_wrong_shapes_are_named() -> None:
    *arguments, _ = inputs(SHAPES[0], "float32", "cpu")
    for index, width in ((0, 97), (0, 114), (1, 65), (2, 63), (3, 3), (5, 3), (6, 33)):
        wrong = list(arguments)
        size = list(wrong[index].shape)
        size[0 if index else 2] = width
        wrong[index] = torch.ones(size)
        with pytest.raises(ValueError, match=r"mamba2_between needs zxBCdt \[B,T,.*got zxBCdt \["):
            mamba2_between(*wrong, 1, 1e-5)


def test_what_the_kernels_cannot_hold_is_refused() -> None:
    for shape in ((1, 5, 32, 2, 1, 16, 5, 0), (1, 5, 512, 1, 1, 64, 4, 0), (1, 5, 1024, 16, 1, 16, 4, 0)):
        *arguments, _ = inputs(shape, "float32", "cpu")
        with pytest.raises(ValueError, match="too large for the kernels of mamba2_between"):
            mamba2_between(*arguments, 1, 1e-5)
    *arguments, _ = inputs(SHAPES[0], "float32", "cpu")
    with pytest.raises(ValueError, match="needs an eps above 0, got 0"):
        mamba2_between(*arguments, 1, 0)
    with pytest.raises(ValueError, match=r"needs zxBCdt \[B,T,"):
        mamba2_between(arguments[0][0], *arguments[1:], 1, 1e-5)


def test_no_steps_are_refused() -> None:
    *arguments, _ = inputs((2, 0, *SHAPES[0][2:]), "float32", "cpu")
    with pytest.raises(ValueError, match="at least one step, got T=0"):
        mamba2_between(*arguments, 1, 1e-5)


# steps, filter, channels of a head, N, channels of a norm
SERVED = (64, 4, 64, 128, 256)


@pytest.mark.parametrize(
    ("ssd", "device", "sizes", "serves"),
    [
        ("triton+mamba_ssm", "cuda", SERVED, "triton fused"),
        ("triton", "cuda", SERVED, "triton fused"),
        ("mamba_ssm", "cuda", SERVED, "parts"),
        ("torch", "cuda", SERVED, "parts"),
        ("auto", "cpu", SERVED, "parts"),
        ("triton+mamba_ssm", "cuda", (16385, *SERVED[1:]), "parts"),
        ("triton+mamba_ssm", "cuda", (64, 5, *SERVED[2:]), "parts"),
        ("triton+mamba_ssm", "cuda", (64, 4, 256, 128, 256), "parts"),
        ("triton", "cuda", (64, 4, 256, 128, 256), "parts"),
        ("triton+mamba_ssm", "cuda", (64, 4, 64, 128, 1024), "parts"),
        ("triton+mamba_ssm", "cuda", (64, 4, 64, 256, 512), "triton fused"),
    ],
)
def test_what_serves(
    ssd: str, device: str, sizes: tuple[int, ...], serves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_INSTALLED", {"triton": True, "fla": True, "mamba_ssm": True})
    assert mamba2_backend(ssd, device, *sizes) == serves


def test_without_mamba_ssm_large_heads_are_left_to_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_INSTALLED", {"triton": True, "fla": False, "mamba_ssm": False})
    assert mamba2_backend("auto", "cuda", *SERVED) == "triton fused"
    assert mamba2_backend("auto", "cuda", 64, 4, 256, 128, 256) == "parts"
