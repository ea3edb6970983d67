"""The recurrences as operators: inputs in every layout, some outputs alone, and ``torch.vmap``.

``test_triton_interpreted.py`` runs this file a second time, in Triton's interpreter, where the kernels serve.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hybrid import kernels
from tests.hybrid.either_form import backend_for
from tests.hybrid.recurrences import ssd_reference, with_gaps, wkv6_reference
from tests.hybrid.test_kernels import compare, relative_error, ssd_inputs, wkv6_inputs

# As in test_kernels: B, T, H, K, V, decay range, initial state; and batch, T, H, P, G, N, dt range, A range, D, state
SMALL = {
    "wkv6": (2, 19, 2, 16, 16, (-1.0, -0.1), True),
    "ssd": (2, 19, 2, 16, 2, 16, (0.01, 0.1), (1, 16), True, True),
}
OPS = {
    "wkv6": (kernels.wkv6, wkv6_reference, wkv6_inputs, {"r", "k", "v"}),
    "ssd": (kernels.ssd, ssd_reference, ssd_inputs, {"x", "B", "C"}),
}
TOLERANCE = 3e-6  # below 1e-6 was seen
EXTREME = 2e-5  # where sums of decays take digits from one another: 4e-6 was seen


def serving(op: str) -> Callable:
    function = OPS[op][0]
    return lambda **inputs: function(**inputs, backend=backend_for("cpu"))


@pytest.mark.parametrize("op", OPS)
def test_a_step_that_forgets_all(op: str) -> None:
    """A decay beyond float32's range takes no digits from the decays beside it."""
    _, reference, make, low = OPS[op]
    case = (
        (1, 40, 1, 16, 16, (-0.2, -0.1), True)
        if op == "wkv6"
        else (1, 40, 1, 16, 1, 16, (0.1, 0.2), (1, 1), True, True)
    )
    inputs = make(case, torch.Generator().manual_seed(9))
    inputs["w" if op == "wkv6" else "dt"][:, 5] *= 1e13
    errors, exact = compare(serving(op), reference, inputs, "cpu", "float32", low)
    assert all(error <= EXTREME for error in errors.values()), errors
    if op == "wkv6":
        inputs = {name: x.float().requires_grad_() for name, x in inputs.items()}
        sum(x.sum() for x in serving(op)(**inputs)).backward()
        assert not exact["w"].grad[:, 5].any() and not inputs["w"].grad[:, 5].any()


@pytest.mark.parametrize("op", OPS)
def test_one_of_the_outputs_alone(op: str) -> None:
    """Gradients where only the output, only the state, or no state at all is used."""
    _, reference, make, _ = OPS[op]
    inputs = make((1, 19, *SMALL[op][2:]), torch.Generator().manual_seed(4))
    for index, with_state in ((0, True), (1, True), (0, False)):
        given = {
            name: x.float().requires_grad_() for name, x in inputs.items() if with_state or name != "initial_state"
        }
        exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
        out = serving(op)(**given, output_final_state=with_state)
        assert with_state or out[1] is None
        expected = reference(**exact)[index]
        weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        (out[index].double() * weights).sum().backward()
        (expected * weights).sum().backward()
        for name, x in given.items():
            if exact[name].grad is None or not exact[name].grad.any():
                assert x.grad is None or not x.grad.any(), name
            else:
                assert relative_error(x.grad, exact[name].grad) <= TOLERANCE, name


@pytest.mark.parametrize("op", OPS)
def test_views_are_read_as_they_are(op: str) -> None:
    """Inputs that are slices of one wider tensor, and heads that are not side by side."""
    inputs = {name: x.float() for name, x in OPS[op][2](SMALL[op], torch.Generator().manual_seed(6)).items()}
    expected = serving(op)(**inputs)
    views = dict(inputs)
    for name, x in inputs.items():
        if x.dim() == 4 and name != "initial_state":
            wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3]), torch.nan)
            wide[:, :, 1:-2] = x
            views[name] = wide[:, :, 1:-2]
    apart = {name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() >= 3 else x for name, x in inputs.items()}
    for given in (views, apart):
        assert any(not x.is_contiguous() for x in given.values())
        for actual, wanted in zip(serving(op)(**given), expected, strict=True):
            assert torch.equal(actual, wanted)


def stacked(op: str, models: int, steps: int = 5) -> tuple[dict[str, torch.Tensor], dict[str, int | None]]:
    """Inputs of several models, one of them shared by all, one with the models not in front."""
    B, _, *rest = SMALL[op]
    case = (1 if steps > 50 else B, steps, *rest)
    sets = [OPS[op][2](case, torch.Generator().manual_seed(seed)) for seed in range(models)]
    shared, moved = ("k", "v") if op == "wkv6" else ("B", "x")
    inputs, dims = {}, {}
    for name in sets[0]:
        dims[name] = None if name == shared else 1 if name == moved else 0
        x = sets[0][name] if name == shared else torch.stack([s[name] for s in sets], dim=dims[name])
        inputs[name] = with_gaps(x.float()) if name in ("u", "A", "D") else x.float()
    return inputs, dims


@pytest.mark.parametrize("op, steps", [("wkv6", 5), ("wkv6", 260), ("ssd", 5), ("ssd", 100)])  # and with states between
def test_vmap_is_a_loop(op: str, steps: int) -> None:
    inputs, dims = stacked(op, 2, steps)
    names = list(inputs)

    def loss(*values: torch.Tensor) -> torch.Tensor:
        out, state = serving(op)(**dict(zip(names, values, strict=True)))
        return (out.square().sum() + state.sin().sum()) / 100

    def pick(m: int) -> list[torch.Tensor]:
        return [x if dims[name] is None else x.select(dims[name], m) for name, x in inputs.items()]

    leaves = [x.requires_grad_() for x in inputs.values()]
    losses = torch.vmap(loss, in_dims=tuple(dims.values()))(*leaves)
    # Two sums of the models' losses at once: the backward operator is mapped as well.
    weights = torch.tensor([[1.0, 1.0], [0.5, -1.0]])
    together = torch.autograd.grad(losses, leaves, weights, is_grads_batched=True)
    again = [x.detach().clone().requires_grad_() for x in inputs.values()]
    named = list(zip(names, again, strict=True))
    picked = [[x if dims[name] is None else x.select(dims[name], m) for name, x in named] for m in (0, 1)]
    alone = torch.stack([loss(*values) for values in picked])
    torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)
    for row, weight in enumerate(weights):
        expected = torch.autograd.grad(alone, again, weight, retain_graph=True)
        for name, actual, wanted in zip(names, together, expected, strict=True):
            assert wanted.any()
            torch.testing.assert_close(actual[row], wanted, rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("op", OPS)
def test_models_with_one_sequence_share_a_state(op: str) -> None:
    """What is shared has no numbers of its own for each model, here not even by sequence."""
    made = OPS[op][2]((1, 20, *SMALL[op][2:]), torch.Generator().manual_seed(12))
    inputs = {name: x.float().requires_grad_() for name, x in made.items()}
    names, own = list(inputs), "v" if op == "wkv6" else "x"
    several = torch.stack((inputs[own], inputs[own] * 0.9)).detach()

    def out(*values: torch.Tensor) -> torch.Tensor:
        return serving(op)(**dict(zip(names, values, strict=True)))[0]

    def with_own(x: torch.Tensor) -> list[torch.Tensor]:
        return [x if name == own else value for name, value in inputs.items()]

    together = torch.vmap(lambda x: out(*with_own(x)))(several)
    for row, x in zip(together, several, strict=True):
        torch.testing.assert_close(row, out(*with_own(x)), rtol=1e-5, atol=1e-6)
    y = out(*inputs.values())
    cotangents = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(13))
    found = torch.autograd.grad(y, list(inputs.values()), cotangents, is_grads_batched=True, retain_graph=True)
    for row, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(y, list(inputs.values()), cotangent, retain_graph=True)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual[row], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_vmap(op: str) -> None:
    inputs, dims = stacked(op, 2)
    names, order = list(inputs), tuple(dims.values())
    function = lambda *values: serving(op)(**dict(zip(names, values, strict=True)))  # noqa: E731
    pairs = [torch.stack((x, x * 0.9)) for x in inputs.values()]
    both = torch.vmap(torch.vmap(function, in_dims=order))(*pairs)
    for index in range(2):
        once = torch.vmap(function, in_dims=order)(*(x[index] for x in pairs))
        for actual, wanted in zip(both, once, strict=True):
            torch.testing.assert_close(actual[index], wanted, rtol=1e-5, atol=1e-6)
