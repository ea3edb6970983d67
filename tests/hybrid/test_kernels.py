"""Both recurrences against a float64 step-by-step reference: outputs, final states, every gradient."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrid import kernels
from hybrid.device import serving_kernels
from hybrid.run import slow_kernels
from tests.hybrid.configs import config
from tests.hybrid.recurrences import ssd_reference, wkv6_of_raw_decays, wkv6_reference

# Largest relative error ||a - b|| / ||b||. CPU: float32 arithmetic. CUDA: Triton multiplies float32 in TF32 (about
# three digits) and bfloat16 with eight bits of mantissa.
TOLERANCE = {("cpu", "float32"): 1e-5, ("cuda", "float32"): 3e-3, ("cuda", "bfloat16"): 2e-2}
# The fused Triton kernels: wkv6 multiplies in full float32, or in TF32 for less; ssd in the inputs' precision.
FUSED = {
    ("wkv6", "float32"): 1e-3, ("wkv6", "bfloat16"): 4e-3, ("ssd", "float32"): 3e-3, ("ssd", "bfloat16"): 8e-3,
}  # fmt: skip

# name: B, T, H, K, V, decay range (log decay per step), initial state
WKV6 = {
    "one step": (2, 1, 2, 16, 32, (-1.0, -0.01), True),
    "short": (2, 5, 2, 16, 32, (-1.0, -0.01), False),
    "odd length": (2, 77, 4, 16, 32, (-1.0, -0.01), True),
    "square head": (1, 128, 2, 64, 64, (-2.0, -0.001), False),
    "no decay": (2, 70, 2, 16, 16, (0.0, 0.0), True),
    "slow": (1, 300, 2, 16, 32, (-0.01, -1e-5), True),
    "extreme": (2, 130, 2, 16, 32, (-20.0, 0.0), True),
    "all e^-20": (1, 96, 2, 16, 16, (-20.0, -20.0), True),
}
# name: B, T, H, P, G, N, dt range, A range, D, initial state
SSD = {
    "one step": (2, 1, 2, 16, 1, 32, (0.001, 0.1), (1, 16), True, True),
    "short": (2, 5, 4, 16, 1, 32, (0.001, 0.1), (1, 16), True, False),
    "odd length": (2, 77, 4, 64, 1, 128, (0.001, 0.1), (1, 16), True, True),
    "groups": (2, 100, 4, 32, 2, 16, (0.001, 0.1), (1, 16), True, True),
    "no skip": (1, 64, 2, 64, 1, 64, (0.001, 0.1), (1, 16), False, False),
    "no decay": (2, 150, 2, 16, 1, 16, (0.001, 0.1), (1e-9, 1e-9), True, True),
    "extreme": (2, 130, 2, 16, 1, 32, (1e-4, 1.25), (0.01, 16), True, True),
    "all e^-20": (1, 96, 2, 16, 1, 16, (1.25, 1.25), (16, 16), True, True),
}
# "chunked" is FLA for wkv6 and mamba_ssm for ssd.
DEVICES = [
    pytest.param("cpu", "float32", "torch", id="cpu"),
    *(
        pytest.param("cuda", dtype, backend, id=f"cuda-{short}-{backend}", marks=pytest.mark.gpu)
        for backend in ("triton", "chunked")
        for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"))
    ),
]


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)


def wkv6_inputs(case: tuple, generator: torch.Generator) -> dict[str, torch.Tensor]:
    B, T, H, K, V, (low, high), with_state = case
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    inputs = {
        "r": normal(B, T, H, K) * K**-0.5,
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "w": uniform((B, T, H, K), low, high, generator),
        "u": normal(H, K),
    }
    if with_state:
        inputs["initial_state"] = normal(B, H, K, V)
    return inputs


def ssd_inputs(case: tuple, generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch, T, H, P, G, N, dt_range, A_range, with_D, with_state = case
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    inputs = {
        "x": normal(batch, T, H, P),
        "dt": uniform((batch, T, H), *dt_range, generator),
        "A": -uniform((H,), *A_range, generator),
        "B": normal(batch, T, G, N),
        "C": normal(batch, T, G, N) * N**-0.5,
    }
    if with_D:
        inputs["D"] = normal(H)
    if with_state:
        inputs["initial_state"] = normal(batch, H, P, N)
    return inputs


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = (t.detach().cpu().double() for t in (actual, expected))
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def compare(
    function, reference, inputs: dict[str, torch.Tensor], device: str, dtype: str, low: set[str]
) -> tuple[dict, dict]:
    """Relative errors of outputs, state and gradients, and the exact inputs with their gradients.

    ``low`` names the inputs held in ``dtype``.
    """
    cast = {}
    for name, x in inputs.items():
        # Round first, so that both sides compute from the same numbers.
        precision = getattr(torch, dtype) if name in low else torch.float32
        cast[name] = x.to(precision).to(device).requires_grad_()
    exact = {name: x.detach().cpu().double().requires_grad_() for name, x in cast.items()}
    out, state = function(**cast)
    out_ref, state_ref = reference(**exact)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (out_ref, state_ref)]
    weights[0] = weights[0].to(out.dtype).double()  # as autograd rounds the gradient of a rounded output
    sum((x.float() * w.to(device)).sum() for x, w in zip((out, state), weights, strict=True)).backward()
    sum((x * w).sum() for x, w in zip((out_ref, state_ref), weights, strict=True)).backward()
    errors = {"output": relative_error(out, out_ref), "state": relative_error(state, state_ref)}
    assert state.dtype == torch.float32
    for name in inputs:
        errors[f"d{name}"] = relative_error(cast[name].grad, exact[name].grad)
    return errors, exact


def with_backend(op: str, backend: str):
    name = kernels.CHUNKED[op] if backend == "chunked" else backend
    return functools.partial(getattr(kernels, op), backend=name)


@pytest.mark.parametrize("case", WKV6)
@pytest.mark.parametrize("device, dtype, backend", DEVICES)
def test_wkv6(case: str, device: str, dtype: str, backend: str) -> None:
    inputs = wkv6_inputs(WKV6[case], torch.Generator().manual_seed(0))
    function = with_backend("wkv6", backend)
    errors, exact = compare(function, wkv6_reference, inputs, device, dtype, low={"r", "k", "v"})
    if backend == "chunked" and case == "all e^-20":
        # FLA forms dw from sums of r*dr - k*dk. Here those cancel to e^-20 of their size, so what is left in low
        # precision is their rounding: it is held against the size of the terms, not of what they cancel to.
        errors["dw"] *= (exact["w"].grad.norm() / (exact["k"] * exact["k"].grad).norm()).item()
    report("wkv6", case, device, dtype, backend, errors)


@pytest.mark.parametrize("case", ["one step", "odd length", "slow"])
@pytest.mark.parametrize("device, dtype, backend", DEVICES)
def test_wkv6_of_raw_decays(case: str, device: str, dtype: str, backend: str) -> None:
    inputs = wkv6_inputs(WKV6[case], torch.Generator().manual_seed(0))
    inputs["w"] = inputs["w"].neg().log()
    function = functools.partial(with_backend("wkv6", backend), raw_decay=True)
    errors, _ = compare(function, wkv6_of_raw_decays, inputs, device, dtype, low={"r", "k", "v", "w"})
    report("wkv6", case, device, dtype, backend, errors)


@pytest.mark.parametrize("decay", [-1e3, -1e13, -torch.inf])
def test_a_step_that_forgets_all_takes_no_digits_from_others(decay: float) -> None:
    """However large its log decay: sums of log decays are what the others are found from."""
    inputs = wkv6_inputs(WKV6["slow"], torch.Generator().manual_seed(0))
    inputs["w"][:, 7] = decay
    errors, _ = compare(with_backend("wkv6", "torch"), wkv6_reference, inputs, "cpu", "float32", low={"r", "k", "v"})
    assert max(errors.values()) < 3e-6, errors
    inputs = ssd_inputs(SSD["groups"], torch.Generator().manual_seed(0))
    inputs["dt"][:, 7], inputs["x"][:, 7] = min(-decay, 1e13), 0
    wanted, found = ssd_reference(**inputs), kernels.ssd(**{k: x.float() for k, x in inputs.items()}, backend="torch")
    for actual, expected in zip(found, wanted, strict=True):
        assert relative_error(actual, expected) < 3e-6


def plain(op: str, T: int, **changed: torch.Tensor) -> tuple[dict, dict, Callable, Callable]:
    """Inputs in float64 and float32, all with gradients, the plain form that serves, and its reference."""
    if op == "wkv6":
        make, reference, case = wkv6_inputs, wkv6_reference, (2, T, 2, 8, 16, (-3.0, -0.01), True)
    else:
        make, reference, case = ssd_inputs, ssd_reference, (2, T, 4, 8, 2, 16, (0.001, 0.5), (1, 16), True, True)
    exact = make(case, torch.Generator().manual_seed(3)) | changed
    inputs = {name: x.float().requires_grad_() for name, x in exact.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return exact, inputs, with_backend(op, "torch"), reference


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_float64_is_computed_in_float64(op: str, T: int) -> None:
    exact, _, function, reference = plain(op, T)
    found, wanted = function(**exact), reference(**exact)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-13
    losses = (sum(x.square().sum() for x in results) for results in (found, wanted))
    gradients = (torch.autograd.grad(loss, list(exact.values())) for loss in losses)
    for name, one, other in zip(exact, *gradients, strict=True):
        assert relative_error(one, other) < 1e-12, name


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_backward_within_autocast_is_computed_in_float32(op: str, T: int) -> None:
    exact, inputs, function, reference = plain(op, T)
    with torch.autocast("cpu", torch.bfloat16):
        sum(x.square().sum() for x in function(**inputs)).backward()
    sum(x.square().sum() for x in reference(**exact)).backward()
    for name, x in inputs.items():
        assert relative_error(x.grad, exact[name].grad) < 3e-6, name


def test_what_strong_decays_leave_of_gradients_has_its_digits() -> None:
    """Of the decay rate and the step sizes: e^-50 and less beside weights that no decay changes."""
    dt = torch.empty(2, 70, 4, dtype=torch.float64).uniform_(50, 90, generator=torch.Generator().manual_seed(4))
    exact, inputs, function, reference = plain("ssd", 70, dt=dt, A=-torch.ones(4, dtype=torch.float64))
    (found,) = torch.autograd.grad(function(**inputs)[0].sum(), inputs["A"])
    (wanted,) = torch.autograd.grad(reference(**exact)[0].sum(), exact["A"])
    assert wanted.any() and relative_error(found, wanted) < 1e-4


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


def test_log_decays_of_low_precision_are_float32() -> None:
    x = torch.tensor([-3.0, 0.3, 3.0], dtype=torch.bfloat16)
    torch.testing.assert_close(kernels.log_decay(x), -x.double().exp().float(), rtol=1e-6, atol=0)
    assert kernels.log_decay(torch.tensor(1e4)).isfinite()


@pytest.mark.parametrize("case", SSD)
@pytest.mark.parametrize("device, dtype, backend", DEVICES)
def test_ssd(case: str, device: str, dtype: str, backend: str) -> None:
    inputs = ssd_inputs(SSD[case], torch.Generator().manual_seed(0))
    errors, _ = compare(with_backend("ssd", backend), ssd_reference, inputs, device, dtype, low={"x", "B", "C"})
    report("ssd", case, device, dtype, backend, errors)


def report(op: str, case: str, device: str, dtype: str, backend: str, errors: dict[str, float]) -> None:
    tolerance = FUSED[op, dtype] if backend == "triton" else TOLERANCE[device, dtype]
    print(
        f"{op} [{case}] {device} {dtype} {backend}: "
        + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    )
    too_large = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not too_large, f"relative errors above {tolerance}: {too_large}"


@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_pieces_equal_whole(op: str) -> None:
    """Carrying the state over pieces of uneven length gives what one call gives."""
    generator = torch.Generator().manual_seed(1)
    if op == "wkv6":
        inputs, along, function = wkv6_inputs((2, 90, 2, 8, 16, (-3.0, -0.01), False), generator), "rkvw", kernels.wkv6
    else:
        case = (2, 90, 4, 8, 2, 16, (0.001, 0.5), (1, 16), True, False)
        inputs, along, function = ssd_inputs(case, generator), ["x", "dt", "B", "C"], kernels.ssd
    inputs = {name: x.float() for name, x in inputs.items()}
    whole, final = function(**inputs)
    pieces, state, start = [], None, 0
    for length in (1, 40, 7, 1, 41):
        part = {name: x[:, start : start + length] if name in along else x for name, x in inputs.items()}
        out, state = function(**part, initial_state=state)
        pieces.append(out)
        start += length
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["wkv6", "ssd", "conv"])
def test_plain_operators_keep_their_promises(op: str) -> None:
    """PyTorch's own check of schemas and of shapes without data, which compilation relies on."""
    module = importlib.import_module(f"hybrid.kernels.{op}")
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(8))  # noqa: E731
    shapes = {
        "wkv6": [(2, 2, 3, 8, 6)] * 2 + [(2, 2, 3, 8, 5), (2, 2, 3, 8, 6), (1, 2, 6)],
        "ssd": [(2, 4, 3, 8, 6), (2, 4, 3, 8), (2, 2, 3, 8, 5), (2, 2, 3, 8, 5)],
        "conv": [(2, 9, 6), (1, 6, 4), (1, 6)],
    }[op]
    inputs = [draw(*shape) for shape in shapes]
    if op == "conv":
        calls = [(*inputs, 9), (*inputs, 6)]
    else:
        decays = 3 if op == "wkv6" else 1
        inputs[decays] = -inputs[decays].abs().to(torch.float32 if op == "wkv6" else torch.float64)
        state = draw(2, 2, 6, 5) if op == "wkv6" else draw(2, 4, 6, 5)
        one = [x[:, :, :1].contiguous() if x.dim() > 3 else x for x in inputs]
        calls = [(*inputs, state, True), (*inputs, None, False), (*one, None, False)]
    for call in calls:
        leaves = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in call]
        torch.library.opcheck(module._forward, leaves)
        results = module._forward(*call)
        backward = [*inputs[:2], draw(*results.shape)] if op == "conv" else [*call[: len(inputs)], results[2]]
        if op != "conv":
            backward += [draw(*results[0].shape), results[1] if call[-1] else None]
        torch.library.opcheck(module._backward, backward, test_utils=("test_schema", "test_faketensor"))


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


@pytest.mark.parametrize("T", [1, 5])
def test_no_final_state_unless_asked_for(T: int) -> None:
    generator = torch.Generator().manual_seed(2)
    case = wkv6_inputs((1, T, 2, 8, 8, (-1.0, -0.1), True), generator)
    assert kernels.wkv6(**case, output_final_state=False)[1] is None
    case = ssd_inputs((1, T, 2, 8, 1, 8, (0.001, 0.1), (1, 16), True, True), generator)
    assert kernels.ssd(**case, output_final_state=False)[1] is None


def test_no_step_is_refused() -> None:
    generator = torch.Generator().manual_seed(2)
    with pytest.raises(ValueError, match="at least one step"):
        kernels.wkv6(**wkv6_inputs((1, 0, 2, 8, 8, (-1.0, -0.1), False), generator))
    with pytest.raises(ValueError, match="at least one step"):
        kernels.ssd(**ssd_inputs((1, 0, 2, 8, 1, 8, (0.001, 0.1), (1, 16), True, False), generator))


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


def test_compiled_graphs_are_those_of_the_present_operators(tmp_path: Path) -> None:
    """A cached graph, also one compiled in another thread, is not found again when an operator in it has changed."""
    program = """
import sys, threading, torch
from pathlib import Path
from hybrid.kernels.operators import operator
@operator("rows", Path(sys.argv[2]))
def rows(x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(int(sys.argv[1]), 3)
@rows.register_fake
def _(x):
    return x.new_empty(int(sys.argv[1]), 3)
def compiled():
    print(torch.compile(lambda x: rows(x).sum())(torch.ones(2)).item())
compiled()
torch.compiler.reset()
thread = threading.Thread(target=compiled)
thread.start(), thread.join()
"""
    operators = tmp_path / "operators"
    operators.mkdir()

    def compiled(rows: int) -> str:
        (operators / "rows.py").write_text(f"ROWS = {rows}\n")
        command = [sys.executable, "-c", program, str(rows), str(operators)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert compiled(2) == "6.0\n6.0\n"
    assert compiled(4) == "12.0\n12.0\n"


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "torch"),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "chunked", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_models_together_equal_models_alone(op: str, device: str, backend: str) -> None:
    """torch.vmap over stacked models, outputs and gradients, against one call for each."""
    function, models = with_backend(op, backend), 3
    if op == "wkv6":
        sets = [wkv6_inputs(WKV6["odd length"], torch.Generator().manual_seed(m)) for m in range(models)]
    else:
        sets = [ssd_inputs(SSD["groups"], torch.Generator().manual_seed(m)) for m in range(models)]
    names = list(sets[0])
    results = []
    for mapped in (True, False):
        leaves = [torch.stack([s[n] for s in sets]).float().to(device).requires_grad_() for n in names]
        call = lambda *values: function(**dict(zip(names, values, strict=True)))  # noqa: E731
        if mapped:
            out, state = torch.vmap(call)(*leaves)
        else:
            each = [call(*(x[m] for x in leaves)) for m in range(models)]
            out, state = (torch.stack(x) for x in zip(*each, strict=True))
        (out.square().sum() + state.square().sum()).backward()
        results.append([out, state, *(x.grad for x in leaves)])
    for name, together, alone in zip(["output", "state", *names], *results, strict=True):
        assert relative_error(together, alone.detach().cpu().double()) <= (1e-3 if device == "cuda" else 1e-6), name


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["wkv6", "ssd"])
def test_fused_kernels_compile_and_replay(op: str) -> None:
    """One compiled graph, captured in a CUDA graph, computes what the eager call does."""
    if op == "wkv6":
        inputs = wkv6_inputs((4, 64, 4, 16, 32, (-1.0, -0.01), False), torch.Generator().manual_seed(0))
    else:
        inputs = ssd_inputs(
            (4, 64, 4, 64, 1, 128, (0.001, 0.1), (1, 16), True, False), torch.Generator().manual_seed(0)
        )
    leaves = [x.float().cuda().requires_grad_() for x in inputs.values()]
    function = with_backend(op, "triton")

    def step(*values: torch.Tensor) -> torch.Tensor:
        return function(**dict(zip(inputs, values, strict=True)), output_final_state=False)[0].square().mean()

    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(compiled(*leaves), leaves)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = torch.autograd.grad(compiled(*leaves), leaves)
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name, actual, wanted in zip(inputs, captured, expected, strict=True):
        assert relative_error(actual, wanted.cpu().double()) <= 1e-5, name
