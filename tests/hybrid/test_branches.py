"""Both recurrent branches against plain re-statements of the published layers, and against FLA's own forward.

The re-statements are written from the papers and the authors' code, in float64, one step after another, and share no
line with the branches.
"""

from __future__ import annotations

import copy
import math

import fla.layers.mamba2 as fla_mamba2
import fla.layers.rwkv6 as fla_rwkv6
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import hybrid.branches.rwkv6
from hybrid.branches.attention import Attention
from hybrid.branches.mamba2 import Mamba2
from hybrid.branches.rwkv6 import RWKV6
from hybrid.init import init_mamba2, init_rwkv6
from hybrid.schema import AttentionConfig, KernelsConfig, MambaConfig, RWKVConfig
from tests.hybrid.configs import relative_error, stir
from tests.hybrid.recurrences import wkv6_reference

TOLERANCE = 2e-5  # relative error of float32 on a CPU
# On CUDA, Triton multiplies float32 in TF32 (ten bits of mantissa), our forward and FLA's in different order.
CUDA_TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}

# name: d_model, options of the branch
RWKV = {
    "default": (128, RWKVConfig()),
    "keys as wide as values": (32, RWKVConfig(num_heads=2, expand_k=1.0, shift_low_rank=4, decay_low_rank=8)),
    "wide values": (24, RWKVConfig(num_heads=3, expand_v=2.0, shift_low_rank=5, decay_low_rank=7)),
}
MAMBA = {
    "default": (128, MambaConfig()),
    "small": (16, MambaConfig(state_size=8, head_dim=8)),
    "two groups": (32, MambaConfig(state_size=8, head_dim=16, n_groups=2)),
    "short filter": (16, MambaConfig(state_size=8, head_dim=4, conv_kernel=2, expand=3)),
}


def rwkv_branch(case: str = "default", init: str = "official", seed: int = 0) -> RWKV6:
    """A branch whose every parameter matters, around the values of an initialisation."""
    torch.manual_seed(seed)
    d_model, options = RWKV[case]
    branch = RWKV6(d_model, options, KernelsConfig())
    if init == "official":
        init_rwkv6(branch, layer=2, layers=5)
    stir(branch, seed)
    return branch.eval()


def mamba_branch(case: str = "default", seed: int = 0) -> Mamba2:
    torch.manual_seed(seed)
    d_model, options = MAMBA[case]
    branch = Mamba2(d_model, options, KernelsConfig())
    init_mamba2(branch, depth_scale=1.0)
    stir(branch, seed)
    with torch.no_grad():  # steps from 0.05 to 2, so that some heads forget within a few steps and others do not
        branch.dt_bias.copy_(torch.linspace(-3.0, 2.0, branch.num_heads))
    return branch.eval()


def noise(batch: int, length: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


# ---- RWKV-6


def x060_parameters(branch: RWKV6) -> dict[str, Tensor]:
    """The branch's weights under the names and in the layouts of RWKV-LM's class RWKV_Tmix_x060, in float64.

    FLA stacks the five mixes as r, w, k, v, g; RWKV-LM as w, k, v, r, g.
    """
    weights = {name: x.detach().double() for name, x in branch.named_parameters()}
    rank, width = branch.proj_low_rank_dim, branch.hidden_size
    fla_order, official_order = "rwkvg", "wkvrg"
    pick = [fla_order.index(letter) for letter in official_order]
    to_low = weights["x_proj.0.linear.weight"].view(5, rank, width)[pick]  # [5R, C], five blocks of rows
    to_full = weights["x_proj.2.weight"].view(width, 5, rank)[:, pick]
    p = {f"time_maa_{letter}": weights["x_bias"][fla_order.index(letter)] for letter in official_order}
    return p | {
        "time_maa_x": weights["x_proj.0.mu"],
        "time_maa_w1": to_low.reshape(5 * rank, width).T,  # [C, 5R]
        "time_maa_w2": to_full.permute(1, 2, 0),  # [5, R, C]
        "time_decay": weights["w_proj.linear.lora.2.bias"],
        "time_decay_w1": weights["w_proj.linear.lora.0.weight"].T,
        "time_decay_w2": weights["w_proj.linear.lora.2.weight"].T,
        "time_faaaa": weights["bonus"],  # [heads, head size]
        "receptance": weights["r_proj.linear.weight"],
        "key": weights["k_proj.linear.weight"],
        "value": weights["v_proj.linear.weight"],
        "gate": weights["g_proj.linear.weight"],
        "output": weights["o_proj.weight"],
        "ln_x.weight": weights["g_norm.weight"],
        "ln_x.bias": weights["g_norm.bias"],
    }


def finch_time_mixing(x: Tensor, p: dict[str, Tensor], ln_x_eps: float) -> Tensor:
    """RWKV-6 time mixing as published: RWKV-LM, RWKV-v5/src/model.py, RWKV_Tmix_x060; arXiv:2404.05892, section 4."""
    B, T, C = x.shape
    H, K = p["time_faaaa"].shape
    V = p["value"].shape[0] // H
    out = torch.zeros_like(x)
    for b in range(B):
        state = [torch.zeros(K, V, dtype=x.dtype) for _ in range(H)]
        before = torch.zeros(C, dtype=x.dtype)
        for t in range(T):
            now = x[b, t]
            xx = before - now
            before = now
            xxx = now + xx * p["time_maa_x"]
            m = torch.tanh(xxx @ p["time_maa_w1"]).split(p["time_maa_w2"].shape[1])
            mw, mk, mv, mr, mg = (part @ up for part, up in zip(m, p["time_maa_w2"], strict=True))
            xw = now + xx * (p["time_maa_w"] + mw)
            xk = now + xx * (p["time_maa_k"] + mk)
            xv = now + xx * (p["time_maa_v"] + mv)
            xr = now + xx * (p["time_maa_r"] + mr)
            xg = now + xx * (p["time_maa_g"] + mg)
            r, k, v, g = p["receptance"] @ xr, p["key"] @ xk, p["value"] @ xv, p["gate"] @ xg
            w = torch.exp(-torch.exp(p["time_decay"] + torch.tanh(xw @ p["time_decay_w1"]) @ p["time_decay_w2"]))
            heads = []
            for h in range(H):
                kv = torch.outer(k[h * K : (h + 1) * K], v[h * V : (h + 1) * V])
                y = r[h * K : (h + 1) * K] @ (state[h] + p["time_faaaa"][h][:, None] * kv)
                state[h] = w[h * K : (h + 1) * K, None] * state[h] + kv
                heads.append((y - y.mean()) / torch.sqrt(y.var(unbiased=False) + ln_x_eps))
            y = torch.cat(heads) * p["ln_x.weight"] + p["ln_x.bias"]
            out[b, t] = p["output"] @ (y * g / (1 + torch.exp(-g)))
    return out


@pytest.mark.parametrize("init, ln_x_eps", [("official", 64e-5), ("fla", 1e-5)])
@pytest.mark.parametrize("case", RWKV)
def test_rwkv6_is_the_published_time_mixing(case: str, init: str, ln_x_eps: float) -> None:
    branch = rwkv_branch(case, init)
    x = noise(2, 70, branch.hidden_size)  # over two borders of the kernel's chunks, and not a multiple of them
    with torch.no_grad():
        out, state = branch(x)
    assert state is None
    assert relative_error(out, finch_time_mixing(x.double(), x060_parameters(branch), ln_x_eps)) < TOLERANCE


@pytest.mark.parametrize("case", ["default", "wide values"])
def test_every_parameter_of_rwkv6_has_a_part_in_that_comparison(case: str) -> None:
    branch = rwkv_branch(case)
    parts = dict(branch.named_parameters())
    for i, mix in enumerate("rwkvg"):
        parts[f"x_bias of {mix}"] = branch.x_bias[i]
        parts[f"x_proj.0 of {mix}"] = branch.x_proj[0].linear.weight.unflatten(0, (5, -1))[i]
        parts[f"x_proj.2 of {mix}"] = branch.x_proj[2].weight.unflatten(1, (5, -1))[:, i]
    assert_all_matter(branch, parts)


@torch.no_grad()
def assert_all_matter(branch: RWKV6 | Mamba2, parts: dict[str, Tensor]) -> None:
    """Zeroing any of ``parts`` (views of the parameters) moves the output far more than the tolerance."""
    x = noise(2, 40, branch.hidden_size)
    whole = branch(x)[0]
    for name, part in parts.items():
        kept = part.clone()
        part.zero_()
        moved = relative_error(branch(x)[0], whole)
        part.copy_(kept)
        assert moved > 100 * TOLERANCE, f"{name} moves the output by {moved:.1e} only"
    assert torch.equal(branch(x)[0], whole)


def kernel_inputs(branch: RWKV6, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What the branch hands to the recurrence: r, k, v and, of the numbers for it, the log decay w, each [B,T,H,*]."""
    caught = {}
    kernel = hybrid.branches.rwkv6.wkv6

    def spy(r: Tensor, k: Tensor, v: Tensor, w: Tensor, *args: object, **kwargs: object) -> tuple:
        assert kwargs["raw_decay"]
        caught.update(r=r, k=k, v=v, w=-torch.exp(w))
        return kernel(r, k, v, w, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(hybrid.branches.rwkv6, "wkv6", spy)
        branch(x)
    return caught


def test_observers_of_rwkv6_see_log_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    branch, seen = rwkv_branch(), {}
    branch.observer = seen.update
    handed = kernel_inputs(branch, noise(2, 9, 128), monkeypatch)
    assert all(torch.equal(seen[name], x) for name, x in handed.items()) and torch.equal(seen["u"], branch.bonus)


def test_rwkv6_decay_depends_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    branch = rwkv_branch()
    w = kernel_inputs(branch, noise(2, 50, 128), monkeypatch)["w"].flatten(0, 1).flatten(1)  # [B*T, channels]
    assert (w < 0).all() and w.isfinite().all()
    log_rate = torch.log(-w)
    assert (log_rate.std(dim=0) > 0.05).all(), "some channel decays at a constant rate"
    assert (log_rate.std(dim=1) > 0.05).all(), "all channels decay at one rate"


def test_rwkv6_decay_learns_from_the_data_from_the_official_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official start has the data-dependent part of the decay at zero; its gradient is not."""
    branch = RWKV6(32, RWKVConfig(num_heads=2), KernelsConfig())
    init_rwkv6(branch, layer=0, layers=4)
    nn.init.normal_(branch.o_proj.weight)  # zero at the start: the first step moves it, then the others follow
    x = noise(2, 30, 32)
    assert kernel_inputs(branch, x, monkeypatch)["w"].flatten(0, 1).std(dim=0).max() == 0
    (branch(x)[0] * noise(2, 30, 32, seed=2)).sum().backward()
    lora = branch.w_proj.linear.lora
    with torch.no_grad():
        lora[0].weight -= lora[0].weight.grad / lora[0].weight.grad.norm()
    assert (kernel_inputs(branch, x, monkeypatch)["w"].flatten(0, 1).std(dim=0) > 0).all()


def test_rwkv6_shifts_tokens_by_exactly_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """r, k, v and w of a position come from its own input and the one before it, and from no other."""
    branch = rwkv_branch("keys as wide as values")
    x = noise(1, 12, 32)
    changed = x.clone()
    changed[:, 5] = -changed[:, 5]
    before, after = (kernel_inputs(branch, inputs, monkeypatch) for inputs in (x, changed))
    for name in ("r", "k", "v", "w"):
        moved = (before[name] != after[name]).flatten(2).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [5, 6], name


# ---- Mamba-2


def sequential_mamba2(x: Tensor, branch: Mamba2) -> Tensor:
    """Mamba-2 as published (arXiv:2405.21060, section 7), with the recurrence of its section 2 step by step."""
    p = {name: value.detach().double() for name, value in branch.named_parameters()}
    B, T, _ = x.shape
    H, P, G, N = branch.num_heads, branch.head_dim, branch.n_groups, branch.ssm_state_size
    inner, taps = H * P, p["conv1d.weight"].shape[-1]
    A, D = -torch.exp(p["A_log"]), p["D"]
    out = torch.zeros_like(x)
    for b in range(B):
        projected = x[b] @ p["in_proj.weight"].T
        z, xBC, dt = projected[:, :inner], projected[:, inner : 2 * inner + 2 * G * N], projected[:, -H:]
        dt = torch.log1p(torch.exp(dt + p["dt_bias"]))
        h = torch.zeros(H, P, N, dtype=x.dtype)
        for t in range(T):
            mixed = p["conv1d.bias"].clone()
            for back in range(taps):  # the last tap is the current position
                if t - back >= 0:
                    mixed += p["conv1d.weight"][:, 0, taps - 1 - back] * xBC[t - back]
            mixed = mixed / (1 + torch.exp(-mixed))
            inputs, Bs, Cs = mixed[:inner].view(H, P), mixed[inner : inner + G * N], mixed[inner + G * N :]
            y = torch.zeros(H, P, dtype=x.dtype)
            for head in range(H):
                group = head // (H // G)
                B_t, C_t = Bs.view(G, N)[group], Cs.view(G, N)[group]
                h[head] = torch.exp(dt[t, head] * A[head]) * h[head] + dt[t, head] * torch.outer(inputs[head], B_t)
                y[head] = h[head] @ C_t + D[head] * inputs[head]
            gated = (y.flatten() * z[t] / (1 + torch.exp(-z[t]))).view(G, inner // G)
            normed = gated / torch.sqrt((gated**2).mean(dim=1, keepdim=True) + 1e-5)
            out[b, t] = p["out_proj.weight"] @ (normed.flatten() * p["norm.weight"])
    return out


@pytest.mark.parametrize("case", MAMBA)
def test_mamba2_is_the_published_ssm(case: str) -> None:
    branch = mamba_branch(case)
    x = noise(2, 70, branch.hidden_size)  # over the border of the kernel's chunks
    with torch.no_grad():
        out, state = branch(x)
        assert relative_error(out, sequential_mamba2(x.double(), branch)) < TOLERANCE
    assert state is None


@pytest.mark.parametrize("case", ["default", "two groups"])
def test_every_parameter_of_mamba2_has_a_part_in_that_comparison(case: str) -> None:
    branch = mamba_branch(case)
    inner, states = branch.intermediate_size, branch.n_groups * branch.ssm_state_size
    parts = dict(branch.named_parameters())
    rows = branch.in_proj.weight.split([inner, inner, states, states, branch.num_heads])
    parts |= {f"in_proj of {name}": part for name, part in zip(("z", "x", "B", "C", "dt"), rows, strict=True)}
    assert_all_matter(branch, parts)


# ---- attention


def test_attention_is_rotary_causal_softmax_attention() -> None:
    """Against complex rotations and an explicit softmax (Su et al. 2021), one query at a time."""
    torch.manual_seed(0)
    branch = Attention(24, AttentionConfig(num_heads=3, rope_base=100.0))
    x = noise(2, 9, 24)
    with torch.no_grad():
        out = branch(x)[0]
    qkv, project = branch.qkv_proj.weight.detach().double(), branch.o_proj.weight.detach().double()
    q, k, v = (x.double() @ qkv.T).split(24, dim=-1)
    turn = 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.zeros(2, 9, 24, dtype=torch.float64)
    for b in range(2):
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)

            def rotated(vector: Tensor, position: int) -> Tensor:  # channels c and c + 4 are one complex number
                return torch.complex(vector[:4], vector[4:]) * torch.exp(1j * position * turn)

            for t in range(9):
                query = rotated(q[b, t, part], t)
                scores = [(query * rotated(k[b, s, part], s).conj()).real.sum() / math.sqrt(8) for s in range(t + 1)]
                expected[b, t, part] = torch.stack(scores).softmax(0) @ v[b, : t + 1, part]
    assert relative_error(out, expected @ project.T) < TOLERANCE


# ---- FLA's own forward, its Triton kernels replaced: how it puts them together, on a CPU


def plain_token_shift(x: Tensor, cu_seqlens: None = None) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1] - x


def plain_wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float, **_: object) -> tuple:
    assert scale == 1.0
    return wkv6_reference(*(x.double() for x in (r, k, v, w, u)))[0].float(), None


class PlainGroupNorm(nn.GroupNorm):
    """FLA's GroupNorm: [B,T,C], each position on its own."""

    def forward(self, o: Tensor) -> Tensor:
        return super().forward(o.flatten(0, 1)).view_as(o)


class PlainGatedNorm(nn.Module):
    """RMSNorm(y * silu(z)) over the whole width: FLA's RMSNormGated with one group."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(y * F.silu(z), y.shape[-1:], self.weight, eps=1e-5)


@pytest.mark.parametrize("T", [70, 20])  # FLA takes another kernel up to 64
def test_rwkv6_is_what_fla_computes_around_its_kernels(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    branch = rwkv_branch()
    theirs = copy.deepcopy(branch)
    theirs.g_norm = PlainGroupNorm(branch.num_heads, branch.value_dim, eps=branch.g_norm.eps)
    theirs.g_norm.load_state_dict(branch.g_norm.state_dict())
    theirs.gate_fn = nn.SiLU()
    monkeypatch.setattr(fla_rwkv6, "token_shift", plain_token_shift)
    monkeypatch.setattr(fla_rwkv6, "chunk_rwkv6", plain_wkv6)
    monkeypatch.setattr(fla_rwkv6, "fused_recurrent_rwkv6", plain_wkv6)
    x = noise(2, T, 128)
    with torch.no_grad():
        expected = fla_rwkv6.RWKV6Attention.forward(theirs, x)[0]
        assert relative_error(branch(x)[0], expected) < TOLERANCE


@pytest.mark.parametrize("T", [70, 300])  # FLA's chunks are of 256
def test_mamba2_is_what_fla_computes_around_its_kernels(T: int) -> None:
    branch = mamba_branch("small")
    theirs = copy.deepcopy(branch)
    theirs.act, theirs.norm = nn.SiLU(), PlainGatedNorm(branch.norm.weight.detach())
    x = noise(1, T, 16)
    with torch.no_grad():
        assert relative_error(branch(x)[0], fla_mamba2.Mamba2.torch_forward(theirs, x)[0]) < TOLERANCE


# ---- FLA's own forward on CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fla", "torch"])
@pytest.mark.parametrize("case", ["default", "keys as wide as values"])  # Triton wants heads of 16 at least
@pytest.mark.parametrize("T", [130, 64])  # FLA's chunked and its recurrent kernel
def test_rwkv6_on_cuda_is_flas_forward(T: int, case: str, backend: str) -> None:
    branch = rwkv_branch(case).cuda()
    branch.backend = backend
    x = noise(2, T, branch.hidden_size).cuda()
    with torch.no_grad():
        theirs = fla_rwkv6.RWKV6Attention.forward(branch, x)[0]
        error = relative_error(branch(x)[0], theirs)
    print(f"rwkv6 [{case}] T={T} {backend} against FLA: {error:.1e}")
    assert error < CUDA_TOLERANCE["float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["torch_forward", "cuda_kernels_forward"])
@pytest.mark.parametrize("case", ["default", "two groups"])
def test_mamba2_on_cuda_is_flas_forward(case: str, path: str) -> None:
    if path == "cuda_kernels_forward" and not fla_mamba2.is_fast_path_available:
        pytest.skip("mamba_ssm is not installed")
    if path == "torch_forward" and MAMBA[case][1].n_groups > 1:
        pytest.skip("FLA's torch_forward repeats B and C of several groups in the wrong order")
    branch = mamba_branch(case).cuda()  # in eval mode FLA convolves and scans in two calls
    x = noise(2, 130, branch.hidden_size).cuda()
    with torch.no_grad():
        theirs = getattr(fla_mamba2.Mamba2, path)(branch, x)[0]
        error = relative_error(branch(x)[0], theirs)
    print(f"mamba2 [{case}] against FLA's {path}: {error:.1e}")
    assert error < CUDA_TOLERANCE["float32"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["rwkv", "mamba"])
def test_branch_on_cuda_is_the_branch_on_a_cpu(name: str, dtype: str) -> None:
    """Outputs and gradients of the default branch with the kernels that CUDA picks, against the CPU's in float32."""
    branch = rwkv_branch() if name == "rwkv" else mamba_branch()
    x, direction = noise(2, 100, 128), noise(2, 100, 128, seed=2)
    results = []
    for device in ("cpu", "cuda"):
        module, inputs = copy.deepcopy(branch).to(device), x.detach().to(device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda" and dtype == "bfloat16"):
            out = module(inputs)[0]
        (out.float() * direction.to(device)).sum().backward()
        found = {"output": out, "input": inputs.grad}
        results.append(found | {f"d {key}": value.grad for key, value in module.named_parameters()})
    errors = {key: relative_error(results[1][key], expected) for key, expected in results[0].items()}
    print(f"{name} {dtype}: " + ", ".join(f"{key} {error:.1e}" for key, error in errors.items()))
    # Sums of many terms that cancel (bonus, decay bias) lose more than the output does.
    assert errors["output"] < CUDA_TOLERANCE[dtype]
    assert max(errors.values()) < 4 * CUDA_TOLERANCE[dtype]
