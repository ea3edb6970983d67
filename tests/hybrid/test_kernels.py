"""Both recurrences against a float64 step-by-step reference: outputs, final states, every gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from hybrid import kernels
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
