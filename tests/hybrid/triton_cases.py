"""The fused Triton kernels on a CPU, in Triton's interpreter; ``test_triton_interpreted.py`` runs this file.

The interpreter computes every product in the operands' full precision and cuts bfloat16 off instead of rounding it,
so low precision is tried with float16 here; the GPU tests in ``test_kernels.py`` have bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 has to be set before Triton is imported"

from hybrid import kernels  # noqa: E402
from hybrid.kernels import (  # noqa: E402
    conv_triton,
    ddlerp_linear_triton,
    mamba2_triton,
    norms_triton,
    ssd_triton,
    wkv6_triton,
)
from hybrid.kernels.carry import carry  # noqa: E402
from tests.hybrid import test_conv, test_ddlerp, test_mamba2_between, test_norms  # noqa: E402
from tests.hybrid.recurrences import ssd_reference, wkv6_of_raw_decays, wkv6_reference  # noqa: E402
from tests.hybrid.test_kernels import compare, relative_error, ssd_inputs, wkv6_inputs  # noqa: E402
from tests.hybrid.test_recurrence_operators import EXTREME, OPS, SMALL, serving  # noqa: E402

# As in test_kernels: B, T, H, K, V, decay range, initial state
WKV6 = {
    "one step": (2, 1, 2, 16, 32, (-1.0, -0.01), True),
    "several programs a sequence": (1, 150, 1, 16, 16, (-0.1, -0.001), True),
    "head sizes 20 and 40": (2, 37, 1, 20, 40, (-2.0, -0.001), True),
    "channels in two programs": (1, 21, 1, 40, 16, (-1.0, -0.01), True),
    "no decay, no state": (1, 33, 1, 16, 16, (0.0, 0.0), False),
    "extreme": (1, 70, 1, 16, 16, (-20.0, 0.0), True),
    "all e^-20": (1, 40, 1, 16, 16, (-20.0, -20.0), True),
    "long sequences, channels in two programs": (1, 257, 2, 40, 20, (-0.1, -0.001), True),
}
# batch, T, H, P, G, N, dt range, A range, D, initial state
SSD = {
    "one step": (2, 1, 2, 16, 1, 32, (0.001, 0.1), (1, 16), True, True),
    "one chunk": (2, 50, 2, 16, 1, 16, (0.001, 0.1), (1, 16), True, False),
    "head sizes 20 and 24, groups": (1, 77, 4, 20, 2, 24, (0.001, 0.1), (1, 16), True, True),
    "no skip": (1, 70, 2, 16, 1, 16, (0.001, 0.1), (1, 16), False, False),
    "a state in two parts": (1, 70, 2, 16, 1, 70, (0.001, 0.1), (1, 16), True, True),
    "no decay": (1, 100, 1, 16, 1, 16, (0.001, 0.1), (1e-9, 1e-9), True, True),
    "extreme": (1, 70, 2, 16, 1, 16, (1e-4, 1.25), (0.01, 16), True, True),
    "all e^-20": (1, 40, 2, 16, 1, 16, (1.25, 1.25), (16, 16), True, True),
}
CASES = {"wkv6": WKV6, "ssd": SSD}
TOLERANCE = {"float32": 3e-6, "float16": 1e-3}  # float32: below 1e-6 was seen
RUNS = [(op, case, "float32") for op in OPS for case in CASES[op]]
RUNS += [("wkv6", "head sizes 20 and 40", "float16"), ("ssd", "head sizes 20 and 24, groups", "float16")]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("op, case, dtype", RUNS)
def test_against_the_reference(op: str, case: str, dtype: str) -> None:
    _, reference, make, low = OPS[op]
    inputs = make(CASES[op][case], torch.Generator().manual_seed(0))
    errors, _ = compare(serving(op), reference, inputs, "cpu", dtype, low)
    print(f"{op} [{case}] {dtype}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    strong = case in ("extreme", "all e^-20") and dtype == "float32"
    too_large = {name: e for name, e in errors.items() if not e <= (EXTREME if strong else TOLERANCE[dtype])}
    assert not too_large


@pytest.mark.parametrize(
    "case", ["one step", "several programs a sequence", "long sequences, channels in two programs"]
)
def test_raw_decays(case: str) -> None:
    """Some of them so large that a step forgets all; the last tile of steps is not full."""
    inputs = wkv6_inputs(WKV6[case], torch.Generator().manual_seed(0))
    inputs["w"] = inputs["w"].neg().log()
    inputs["w"][:, 7:9] = 40.0
    function = functools.partial(kernels.wkv6, backend="triton", raw_decay=True)
    errors, exact = compare(function, wkv6_of_raw_decays, inputs, "cpu", "float32", {"r", "k", "v", "w"})
    assert all(error <= TOLERANCE["float32"] for error in errors.values()), errors
    inputs = {name: x.float().requires_grad_() for name, x in inputs.items()}
    sum(x.sum() for x in function(**inputs)).backward()
    assert not exact["w"].grad[:, 7:9].any() and not inputs["w"].grad[:, 7:9].any()


@pytest.mark.parametrize("T", [64, 304])
def test_many_steps_that_forget_all_before_some_that_do_not(T: int) -> None:
    """Large decays take no digits from the small ones after them."""
    inputs = wkv6_inputs((1, T, 1, 16, 16, (-0.001, 0.0), True), torch.Generator().manual_seed(11))
    inputs["w"][:, torch.arange(T) % 64 < 40] = -104.0
    errors, _ = compare(serving("wkv6"), wkv6_reference, inputs, "cpu", "float32", {"r", "k", "v"})
    assert all(error <= TOLERANCE["float32"] for error in errors.values()), errors


@pytest.mark.parametrize("way", ["one program", "states given"])
def test_how_sequences_are_shared_out(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing a sequence out over programs, and how they find their states, changes nothing but rounding."""
    inputs = wkv6_inputs((1, 150, 1, 40, 16, (-0.3, -0.001), True), torch.Generator().manual_seed(3))
    launch = wkv6_triton.choose(1, 150, 1, 40, 16, backward=False)
    assert launch.chunks_per_program < 10 and not launch.between  # else the other tests have this way as well
    if way == "one program":
        other = dataclasses.replace(launch, chunks_per_program=10)
    else:
        other = dataclasses.replace(launch, chunks_per_program=4, between=True)
    monkeypatch.setattr(wkv6_triton, "choose", lambda *_, **__: other)
    errors, _ = compare(serving("wkv6"), wkv6_reference, inputs, "cpu", "float32", {"r", "k", "v"})
    assert all(error <= TOLERANCE["float32"] for error in errors.values()), errors


@pytest.mark.parametrize("case", ["head sizes 20 and 24, groups", "a state in two parts"])
def test_one_program_walks_all_chunks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What many sequences get; the other tests have so few that their chunks are read at the same time."""
    inputs = ssd_inputs(SSD[case], torch.Generator().manual_seed(12))
    monkeypatch.setattr(ssd_triton, "_BUSY", 0)
    monkeypatch.setattr(ssd_triton, "carry", None)
    errors, _ = compare(serving("ssd"), ssd_reference, inputs, "cpu", "float32", {"x", "B", "C"})
    assert all(error <= TOLERANCE["float32"] for error in errors.values()), errors


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_carry(by_row: bool, back: bool) -> None:
    """More parts than one scan takes, from outside of the sequence to what leaves it."""
    generator = torch.Generator().manual_seed(13)
    parts, rows, columns = 70, 5, 20
    added = torch.randn(1, 2, parts, rows, columns, generator=generator)
    left = torch.rand(1, 2, parts, *([rows] if by_row else []), generator=generator)
    outer = torch.randn(1, 2, rows, columns, generator=generator)
    order = range(parts - 1, -1, -1) if back else range(parts)
    expected, state = {}, outer.double()
    for n in order:
        expected[n] = state
        state = state * left[:, :, n].double().reshape(1, 2, -1, 1) + added[:, :, n]
    states = added.roll(-1 if back else 1, dims=2)
    states[:, :, order[0]] = torch.nan  # is not read
    last = added[:, :, order[-1]].clone()
    carry(states, left, outer, last, back)
    assert relative_error(states, torch.stack([expected[n] for n in range(parts)], 2)) <= 1e-6
    assert relative_error(last, state) <= 1e-6
    states = added.roll(-1 if back else 1, dims=2)
    carry(states, left, None, torch.empty(0), back)
    assert not states[:, :, order[0]].any()


@pytest.mark.parametrize("op", OPS)
def test_operators_keep_their_promises(op: str) -> None:
    """PyTorch's own check of schema, shapes without data, and gradients, which compilation relies on."""
    made = OPS[op][2]((1, 3, *SMALL[op][2:]), torch.Generator().manual_seed(8))
    inputs = {name: x.float().requires_grad_() for name, x in made.items()}
    inputs |= {name: inputs[name].detach()[None].requires_grad_() for name in ("u", "A", "D") if name in inputs}
    module, more = (wkv6_triton, [True, True]) if op == "wkv6" else (ssd_triton, [])
    for final, state in ((True, True), (False, False)):
        args = [x if state or name != "initial_state" else None for name, x in inputs.items()]
        torch.library.opcheck(module._forward, (*args, final, *more))
    detached = {name: x.detach() for name, x in inputs.items()}
    initial = detached.pop("initial_state")
    out, last, borders = module._forward(*detached.values(), initial, True, *more)
    named = detached | {"borders": borders, "initial": True, "raw": True}
    named |= {"do": torch.ones_like(out), "dfinal": last, "dy": torch.ones_like(out)}
    order = [name for name in inspect.signature(module._backward._init_fn).parameters]
    torch.library.opcheck(
        module._backward, [named[name] for name in order], test_utils=("test_schema", "test_faketensor")
    )


def test_operators_of_the_token_shift_keep_their_promises() -> None:
    values, shares = test_ddlerp.inputs((2, 5, 16, 16), "float32", "cpu", models=1)
    args = [x.requires_grad_() if i < 3 else x[None].requires_grad_() for i, x in enumerate(values)]
    torch.library.opcheck(ddlerp_linear_triton._forward, args)
    _, *rest = (x.detach() for x in args)
    shifted = torch.randn(2, 5, 5 * 16)
    torch.library.opcheck(
        ddlerp_linear_triton._backward,
        [*rest[:4], shifted, *rest[4:], *shares],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_operators_of_the_convolution_keep_their_promises() -> None:
    x, weight, bias, share = test_conv.inputs((2, 21, 20, 4), "float32", "cpu")
    args = [x.requires_grad_(), *(t[None].requires_grad_() for t in (weight, bias))]
    torch.library.opcheck(conv_triton._forward, args)
    backward = [*(t.detach() for t in args), share]
    torch.library.opcheck(conv_triton._backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(2, 20, 32, 2, 1, 16, 4, 12), (1, 70, 32, 2, 1, 16, 4, 6)], ids=str)
def test_operators_of_a_layer_of_mamba2_keep_their_promises(shape: tuple[int, ...]) -> None:
    zxBCdt, *own, share = test_mamba2_between.inputs(shape, "float32", "cpu")
    own[0] = conv_triton.filled(own[0])
    args = [zxBCdt.nan_to_num().requires_grad_(), *(t[None].requires_grad_() for t in own)]
    # Not with sizes that stand for any: PyTorch's algebra takes minutes with these, and nothing here compiles so.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(mamba2_triton._forward, (*args, shape[4], 1e-5), test_utils=checks)
    args = [t.detach() for t in args]
    _, *kept = mamba2_triton._forward(*args, shape[4], 1e-5)
    torch.library.opcheck(
        mamba2_triton._backward, (*args, *kept, share, shape[4], 1e-5), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("kind", test_norms.KINDS)
def test_operators_of_the_norms_keep_their_promises(kind: str) -> None:
    x, gate, *own, share = test_norms.inputs(kind, (2, 150, 2, 16), "float32", "cpu")
    own = [parameter[None] for parameter in own] + [None] * (2 - len(own))
    args = [None if t is None else t.requires_grad_() for t in (x, gate, *own)]
    torch.library.opcheck(norms_triton._forward, (*args, 2, 1e-5))
    args = [None if t is None else t.detach() for t in (*args, share)]
    torch.library.opcheck(norms_triton._backward, (*args, 2, 1e-5), test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernels_cannot_hold_is_refused() -> None:
    r, x = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 128)
    with pytest.raises(ValueError, match="wkv6 are too large for its triton kernels; use torch or fla"):
        kernels.wkv6(r, r, torch.zeros(1, 4, 2, 300), r, torch.zeros(2, 8), backend="triton")
    with pytest.raises(ValueError, match="ssd are too large for its triton kernels; use torch or mamba_ssm"):
        B = torch.zeros(1, 4, 1, 200)
        kernels.ssd(x, torch.ones(1, 4, 2), -torch.ones(2), B, B, backend="triton")
    with pytest.raises(ValueError, match=r"wkv6 take float32, bfloat16 or float16, got torch\.float64"):
        kernels.wkv6(r.double(), r, r, r, torch.zeros(2, 8), backend="triton")
    with pytest.raises(kernels.BackendError, match="need a CUDA device"):
        kernels.wkv6(r, r, r, r, torch.zeros(2, 8), backend="triton+fla")
