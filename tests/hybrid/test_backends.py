"""Which code serves the recurrences, what records and messages say of it, and what all of it refuses."""

from __future__ import annotations

import pytest
import torch

from hybrid import kernels
from hybrid.device import serving_kernels
from hybrid.run import slow_kernels
from tests.hybrid.configs import config
from tests.hybrid.test_kernels import ssd_inputs, wkv6_inputs


@pytest.mark.parametrize(
    ("op", "steps", "asked", "overrides", "serving"),
    [
        ("wkv6", 64, "triton+fla", [], "triton"),
        ("wkv6", 20_000, "triton+fla", [], "fla"),
        ("wkv6", 64, "triton+fla", ["model.rwkv.num_heads=1", "model.rwkv.expand_v=2"], "fla"),
        # An error where it is called, if it ever is.
        ("wkv6", 64, "triton", ["model.rwkv.num_heads=1", "model.rwkv.expand_v=2"], "triton"),
        ("wkv6", 20_000, "triton", [], "triton"),
        ("wkv6", 64, "torch", [], "torch"),
        ("ssd", 64, "triton+mamba_ssm", [], "triton"),
        ("ssd", 20_000, "triton+mamba_ssm", [], "mamba_ssm"),
        ("ssd", 64, "triton+mamba_ssm", ["model.mamba.state_size=1024"], "mamba_ssm"),
    ],
)
def test_what_is_recorded_is_what_serves(
    op: str, steps: int, asked: str, overrides: list[str], serving: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("triton", "fla", "mamba_ssm"):
        monkeypatch.setitem(kernels._INSTALLED, package, True)
    cfg = config("trainer.device=cuda", "trainer.dtype=float32", "kernels=torch", *overrides)
    cfg.data.seq_len = steps
    setattr(cfg.kernels, op, asked)
    assert serving_kernels(cfg)[op] == serving


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.device=cuda", "kernels=torch"], "kernels.ssd=torch and kernels.wkv6=torch"),
        (["trainer.device=cuda", "kernels=torch", "model=mamba2"], "kernels.ssd=torch"),
        (["trainer.device=cuda", "kernels=torch", "model=transformer"], None),
        (["trainer.device=cuda", "kernels.ssd=triton", "model=mamba2"], None),
        (["trainer.device=cpu", "kernels=torch"], None),
    ],
)
def test_plain_pytorch_on_a_gpu_is_called_slow(overrides: list[str], said: str | None) -> None:
    message = slow_kernels(config(*overrides))
    assert message == (None if said is None else f"slow: plain PyTorch computes the recurrence on the GPU ({said})")


def test_which_backend_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``auto`` means, and who serves short and long calls; the record holds the name for both."""
    for op, chunked in (("wkv6", "fla"), ("ssd", "mamba_ssm")):
        for installed, name, short, long in (
            ({"triton", chunked}, f"triton+{chunked}", "triton", chunked),
            ({"triton"}, "triton", "triton", "triton"),
            ({chunked}, chunked, chunked, chunked),
            (set(), "torch", "torch", "torch"),
        ):
            monkeypatch.setattr(kernels, "_INSTALLED", {n: n in installed for n in ("triton", "fla", "mamba_ssm")})
            assert kernels.resolve_backend(op, "auto", "cuda") == name
            assert kernels.resolve_backend(op, name, "cuda") == name  # what was recorded can be asked for again
            limit = kernels.LONGEST[op]
            assert kernels.serving_backend(op, "auto", "cuda", limit) == short
            assert kernels.serving_backend(op, "auto", "cuda", limit + 1) == long
            assert kernels.serving_backend(op, "auto", "cpu", 1) == "torch"
            if name != "triton":
                assert kernels.serving_backend(op, "auto", "cuda", 1, fits=False) == long
        monkeypatch.setitem(kernels._INSTALLED, "triton", True)
        with pytest.raises(kernels.BackendError, match=f"the {chunked} kernels of {op} are not installed"):
            kernels.resolve_backend(op, f"triton+{chunked}", "cuda")


def test_wrong_shapes_and_backends_are_named() -> None:
    r = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"u \[2, 9\]"):
        kernels.wkv6(r, r, r, r, torch.zeros(2, 9))
    x, B = torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="G dividing H"):
        kernels.ssd(x, torch.ones(1, 4, 3), -torch.ones(3), B, B)
    with pytest.raises(kernels.BackendError, match="need a CUDA device"):
        kernels.wkv6(r, r, r, r, torch.zeros(2, 8), backend="fla")
    with pytest.raises(kernels.BackendError, match="torch, triton, mamba_ssm and triton\\+mamba_ssm, not 'fla'"):
        kernels.ssd(x, torch.ones(1, 4, 3), -torch.ones(3), x, x, backend="fla")


def test_no_step_is_refused() -> None:
    generator = torch.Generator().manual_seed(2)
    with pytest.raises(ValueError, match="at least one step"):
        kernels.wkv6(**wkv6_inputs((1, 0, 2, 8, 8, (-1.0, -0.1), False), generator))
    with pytest.raises(ValueError, match="at least one step"):
        kernels.ssd(**ssd_inputs((1, 0, 2, 8, 1, 8, (0.001, 0.1), (1, 16), True, False), generator))


@pytest.mark.parametrize("T", [1, 5])
def test_no_final_state_unless_asked_for(T: int) -> None:
    generator = torch.Generator().manual_seed(2)
    case = wkv6_inputs((1, T, 2, 8, 8, (-1.0, -0.1), True), generator)
    assert kernels.wkv6(**case, output_final_state=False)[1] is None
    case = ssd_inputs((1, T, 2, 8, 1, 8, (0.001, 0.1), (1, 16), True, True), generator)
    assert kernels.ssd(**case, output_final_state=False)[1] is None
