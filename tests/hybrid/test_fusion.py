"""Every fusion: its parameter count, its formula, where it starts, and what of the past it sees."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from hybrid import build_model
from hybrid.config import CONF_DIR, group_options
from hybrid.fusion import FUSIONS, Fusion, build_fusion, window_attention
from hybrid.schema import FusionConfig
from hybrid.sizes import FUSION_PARAMS, fusion_params
from hybrid.training.evaluation import Evaluation, evaluate
from tests.hybrid.configs import VOCAB, config, relative_error, small, stir, tokens

# A new fusion needs a row here: its parameters at width 128 with the options of its YAML file.
PARAMETERS = {
    "gain": 256,
    "weighted": 1,
    "gated": 257,
    "gated_channel": 32_896,
    "concat": 32_768,
    "residual": 16_384,
    "cross_attention": 65_536,
}
NORMS = ("none", "rms")


def fusion(name: str, width: int = 12, **options: object) -> Fusion:
    """With the options of its YAML file where none are given."""
    given = yaml.safe_load((CONF_DIR / "fusion" / f"{name}.yaml").read_text())
    torch.manual_seed(0)
    return build_fusion(width, FusionConfig(**(given | options)), ("rwkv", "mamba"))


def stirred(name: str, width: int = 12, **options: object) -> Fusion:
    built = fusion(name, width, **options)
    stir(built)
    return built


def outputs(batch: int = 2, length: int = 9, width: int = 12) -> tuple[Tensor, Tensor]:
    """Two branch outputs of unlike size."""
    generator = torch.Generator().manual_seed(3)
    return tuple(scale * torch.randn(batch, length, width, generator=generator) for scale in (1.0, 3.0))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# ---- what there is


def test_every_fusion_has_its_class_file_count_and_row() -> None:
    assert set(FUSIONS) == set(FUSION_PARAMS) == set(PARAMETERS) == set(group_options("fusion"))
    for name in FUSIONS:
        assert yaml.safe_load((CONF_DIR / "fusion" / f"{name}.yaml").read_text())["name"] == name


@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_at_width_128(name: str, branch_norm: str) -> None:
    cfg = config(f"fusion={name}", f"fusion.branch_norm={branch_norm}").fusion
    built = build_fusion(128, cfg, ("rwkv", "mamba"))
    assert sum(p.numel() for p in built.parameters()) == PARAMETERS[name]
    assert fusion_params(128, cfg) == PARAMETERS[name]


@pytest.mark.parametrize("name, options", [*((name, {}) for name in PARAMETERS), ("cross_attention", {"num_heads": 3})])
def test_counted_parameters_are_the_built_ones(name: str, options: dict) -> None:
    options = options | ({"head_dim": 5} if name == "cross_attention" else {})
    built = fusion(name, 20, **options)
    given = yaml.safe_load((CONF_DIR / "fusion" / f"{name}.yaml").read_text())
    assert sum(p.numel() for p in built.parameters()) == fusion_params(20, FusionConfig(**(given | options)))


# ---- formulas


@torch.no_grad()
def restated(built: Fusion, name: str, a: Tensor, b: Tensor) -> Tensor:
    p = {key: value.double() for key, value in built.named_parameters()}
    a, b = a.double(), b.double()
    if built.branch_norm:
        a, b = (x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-5) for x in (a, b))
    both = torch.cat((a, b), dim=-1)
    if name == "gain":
        return p["rwkv_gain"] * a + p["mamba_gain"] * b
    if name == "weighted":
        return p["weight"] * a + (1 - p["weight"]) * b
    if name in ("gated", "gated_channel"):
        g = sigmoid(both @ p["gate.weight"].T + p["gate.bias"])
        assert g.shape[-1] == (1 if name == "gated" else a.shape[-1])
        return g * a + (1 - g) * b
    if name == "concat":
        return both @ p["proj.weight"].T
    if name == "residual":
        return a + b @ p["proj.weight"].T
    assert name == "cross_attention"
    found = []
    for asking, asked in (("a", "b"), ("b", "a")):
        x = {"a": a, "b": b}
        queries = (x[asking] @ p[f"qkv_{asking}.weight"].T).chunk(3, dim=-1)[0]
        _, keys, values = (x[asked] @ p[f"qkv_{asked}.weight"].T).chunk(3, dim=-1)
        found.append(naive_window_attention(queries, keys, values, built.num_heads, built.window))
    # Heads of the two directions alternate: head h holds what a found in b, then what b found in a.
    B, T, _ = a.shape
    joined = torch.stack([x.view(B, T, built.num_heads, -1) for x in found], dim=3).reshape(B, T, -1)
    return (a + b) / 2 + joined @ p["out.weight"].T


def naive_window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, window: int) -> Tensor:
    """One query at a time; all [B,T,heads*D], in float64."""
    out = torch.zeros_like(q)
    D = q.shape[-1] // heads
    for t in range(q.shape[1]):
        first = max(0, t - window + 1)
        for h in range(heads):
            part = slice(h * D, (h + 1) * D)
            scores = torch.einsum("bd,bsd->bs", q[:, t, part], k[:, first : t + 1, part]) / math.sqrt(D)
            out[:, t, part] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, first : t + 1, part])
    return out


@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_formula(name: str, branch_norm: str) -> None:
    options = {"window": 4, "num_heads": 3, "head_dim": 5} if name == "cross_attention" else {}
    built = stirred(name, branch_norm=branch_norm, **options)
    a, b = outputs()
    with torch.no_grad():
        out, state = built(a, b)
    assert state is None
    assert relative_error(out, restated(built, name, a, b)) < 1e-6


@pytest.mark.parametrize("name", PARAMETERS)
def test_branch_norm_makes_the_size_of_a_branch_irrelevant(name: str) -> None:
    a, b = outputs()
    with torch.no_grad():
        normed, plain = stirred(name, branch_norm="rms"), stirred(name)
        torch.testing.assert_close(normed(7 * a, b)[0], normed(a, b)[0], rtol=1e-4, atol=1e-4)
        assert relative_error(plain(7 * a, b)[0], plain(a, b)[0]) > 0.1


def test_branch_norm_of_a_silent_branch_is_silent_and_has_a_gradient() -> None:
    """RWKV-6 starts with an output of exactly zero."""
    built = fusion("gain", branch_norm="rms")
    a = torch.zeros(1, 3, 12, requires_grad=True)
    out = built(a, outputs(1, 3)[1])[0]
    assert torch.equal(out, built(torch.zeros(1, 3, 12), outputs(1, 3)[1])[0])
    out.sum().backward()
    assert a.grad.isfinite().all() and (a.grad != 0).all()


# ---- where they start


@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_start(name: str, branch_norm: str) -> None:
    """The average of the branches, but for the gates' own start of 0.3 and the residual's whole first branch."""
    built = fusion(name, branch_norm=branch_norm)
    a, b = outputs()
    with torch.no_grad():
        out = built(a, b)[0]
        if branch_norm == "rms":
            a, b = (x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-5) for x in (a, b))
    share_a, share_b = {"residual": (1, 0.5), "gated": (0.3, 0.7), "gated_channel": (0.3, 0.7)}.get(name, (0.5, 0.5))
    torch.testing.assert_close(out, share_a * a + share_b * b)


@pytest.mark.parametrize("gate_init", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", ["gated", "gated_channel"])
def test_gate_starts_at_gate_init_everywhere(name: str, gate_init: float) -> None:
    built = fusion(name, gate_init=gate_init)
    seen: list[Tensor] = []
    built.observer = seen.append
    a, b = outputs()
    out = built(a, b)[0]
    (gate,) = seen
    assert gate.shape == (2, 9, 1 if name == "gated" else 12) and not gate.requires_grad
    torch.testing.assert_close(gate, torch.full_like(gate, gate_init))
    torch.testing.assert_close(out, gate_init * a + (1 - gate_init) * b)


def test_gain_and_weight_start_as_configured() -> None:
    a, b = outputs()
    with torch.no_grad():
        torch.testing.assert_close(fusion("gain", gain_init=[0.7, 0.3])(a, b)[0], 0.7 * a + 0.3 * b)
        torch.testing.assert_close(fusion("weighted", weight_init=0.2)(a, b)[0], 0.2 * a + 0.8 * b)


@pytest.mark.parametrize("name", ["concat", "residual"])
def test_random_projection_is_random(name: str) -> None:
    weight = fusion(name, proj_init="random").proj.weight
    assert weight.std() > 0.05 and not torch.equal(weight, fusion(name).proj.weight)


def corpus() -> SimpleNamespace:
    """Three validation batches of real text's shape, the last one short and padded."""
    texts = tokens(5, 33, seed=9).numpy().astype(np.int64)
    batches = [(texts[i : i + 2, :-1].copy(), texts[i : i + 2, 1:].copy()) for i in (0, 2, 4)]
    batches[-1][1][:, 20:] = -100
    return SimpleNamespace(val_batches=lambda batch_size: iter(batches), val_bytes=5 * 32 - 12)


def measure(*overrides: str) -> Evaluation:
    model = build_model(small("model.pattern='P R P'", *overrides)).train()
    found = evaluate(model, corpus(), 2, torch.device("cpu"), torch.float32)
    assert model.training and all(block.fusion.observer is None for block in model.blocks if hasattr(block, "fusion"))
    # Official initialisation leaves the untrained model near the uniform guess.
    assert found.loss == pytest.approx(math.log(VOCAB), abs=0.05)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))  # a token is a byte here
    return found


@pytest.mark.parametrize("gate_init", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("name", ["gated", "gated_channel"])
def test_gate_measured_by_the_evaluation_at_step_0(name: str, gate_init: float) -> None:
    found = measure(f"fusion={name}", f"fusion.gate_init={gate_init}")
    assert found.gate_mean == pytest.approx([gate_init] * 2, abs=1e-6)  # the two P blocks


def test_evaluation_reports_the_weight_and_no_gate_where_there_is_none() -> None:
    assert measure("fusion=weighted", "fusion.weight_init=0.4").gate_mean == pytest.approx([0.4] * 2)
    for name in PARAMETERS.keys() - {"weighted", "gated", "gated_channel"}:
        assert measure(f"fusion={name}").gate_mean is None


# ---- cross-attention's window


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 16, 21])
def test_window_attention_is_masked_attention(T: int, window: int) -> None:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, 3, T, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    flat = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    expected = naive_window_attention(*flat, heads=3, window=window)
    torch.testing.assert_close(window_attention(q, k, v, 0, window).transpose(1, 2).flatten(2), expected)
    # The last queries alone, with any number of positions before them up to window - 1.
    for new in range(1, T + 1):
        past = min(T - new, window - 1)
        out = window_attention(q[:, :, T - new :], k[:, :, T - new - past :], v[:, :, T - new - past :], past, window)
        torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected[:, T - new :])


@pytest.mark.parametrize("window", [1, 4, 64])
def test_cross_attention_sees_exactly_its_window(window: int) -> None:
    built = stirred("cross_attention", window=window).double()
    a, b = (x.double() for x in outputs(1, 11))
    # d out_t / d input_s, summed over channels: which positions reach which.
    for which in (0, 1):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, which=which: built(*((x, b) if which == 0 else (a, x)))[0], (a, b)[which]
        )
        reaches = (jacobian.abs().sum(dim=(0, 2, 3, 5)) > 1e-9).tolist()
        assert reaches == [[0 <= t - s < window for s in range(11)] for t in range(11)]


@pytest.mark.parametrize("pieces", [(11,), (1,) * 11, (3, 1, 7), (10, 1), (1, 10), (4, 4, 3), (5, 6)])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 64])
def test_cross_attention_carries_its_window(window: int, pieces: tuple[int, ...]) -> None:
    built = stirred("cross_attention", window=window)
    a, b = outputs(2, 11)
    with torch.no_grad():
        whole = built(a, b)[0]
        state, found = built.initial_state(2), []
        for x, y in zip(a.split(pieces, dim=1), b.split(pieces, dim=1), strict=True):
            out, state = built(x, y, state)
            found.append(out)
            assert {tensor.shape[2] for tensor in state.values()} == {min(sum(p.shape[1] for p in found), window - 1)}
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_cross_attention_costs_linear_in_length() -> None:
    """No tensor of it grows with the square of the length."""
    built = stirred("cross_attention", window=4)
    largest = []
    for T in (64, 128):
        saved: list[int] = []

        def pack(x: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            built(*(x.requires_grad_() for x in outputs(1, T)))
        largest.append(max(saved))
    assert largest[1] <= 2 * largest[0]


# ---- in the model


@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_reach_every_parameter(name: str, branch_norm: str) -> None:
    model = build_model(small(f"fusion={name}", f"fusion.branch_norm={branch_norm}", "model.pattern=P*2"))
    stir(model)
    text = tokens(4, 40)
    logits = model(text)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        rows = parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad.view(1, -1)
        used = rows.norm(dim=1) > 0
        assert used.all(), f"{key}: no gradient in {int((~used).sum())} of {len(rows)} rows"


def test_fusion_owns_the_names_of_what_it_joins() -> None:
    names = {name: [key for key, _ in fusion(name).named_parameters()] for name in PARAMETERS}
    assert names["gain"] == ["rwkv_gain", "mamba_gain"]
    twins = build_fusion(12, FusionConfig(name="gain", gain_init=[0.5, 0.5]), ("rwkv_a", "rwkv_b"))
    assert [key for key, _ in twins.named_parameters()] == ["rwkv_a_gain", "rwkv_b_gain"]
