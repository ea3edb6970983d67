"""The values a whole model starts with: the authors' formulas under ``official``, FLA's own under ``fla``.

Everything is checked on finished models, so that nothing that runs later can have overwritten it. The formulas are
written out from RWKV-LM (RWKV-v5/src/model.py) and state-spaces/mamba, channel by channel.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fla.layers.mamba2 import Mamba2 as FlaMamba2
from fla.layers.rwkv6 import RWKV6Attention
from torch import Tensor

from hybrid import build_model
from hybrid.branches.mamba2 import Mamba2
from hybrid.branches.rwkv6 import RWKV6
from hybrid.init import seeded
from hybrid.model import HybridLM
from tests.hybrid.configs import config, small, tokens

LAYERS, WIDTH = 5, 32
STACK = (
    f"model.pattern=P*{LAYERS}",
    f"model.d_model={WIDTH}",
    "model.rwkv.num_heads=2",
    "model.mamba.head_dim=4",  # 16 heads a layer: enough of dt and A to see how they spread
)


@pytest.fixture(scope="module")
def official() -> HybridLM:
    return build_model(small(*STACK))


@pytest.fixture(scope="module")
def fla() -> HybridLM:
    return build_model(small(*STACK, "init=fla"))


def rwkv(model: HybridLM, layer: int) -> RWKV6:
    return model.blocks[layer].rwkv


def mamba(model: HybridLM, layer: int) -> Mamba2:
    return model.blocks[layer].mamba


def close(actual: Tensor, expected: list[float] | np.ndarray) -> None:
    np.testing.assert_allclose(actual.detach().flatten().numpy(), np.ravel(expected), rtol=1e-5, atol=1e-6)


# ---- RWKV-6, official


def published_mixes(layer: int) -> dict[str, list[float]]:
    """time_maa_* of RWKV_Tmix_x060, in a loop over channels as there."""
    ratio_0_to_1 = layer / (LAYERS - 1)
    ratio_1_to_almost0 = 1.0 - layer / LAYERS
    ddd = [i / WIDTH for i in range(WIDTH)]
    shift = [1.0 - math.pow(d, ratio_1_to_almost0) for d in ddd]
    slow = [1.0 - math.pow(d, 0.5 * ratio_1_to_almost0) for d in ddd]
    value = [1.0 - (math.pow(d, ratio_1_to_almost0) + 0.3 * ratio_0_to_1) for d in ddd]
    return {"x": shift, "w": shift, "k": shift, "v": value, "r": slow, "g": slow}


@pytest.mark.parametrize("layer", range(LAYERS))
def test_official_token_shift(official: HybridLM, layer: int) -> None:
    mixes, branch = published_mixes(layer), rwkv(official, layer)
    close(branch.x_proj[0].mu, mixes["x"])
    for row, letter in zip(branch.x_bias, "rwkvg", strict=True):  # FLA's order
        close(row, mixes[letter])
    if layer == 2:  # by hand: half-way channel of the middle layer of five
        assert mixes["k"][16] == pytest.approx(1 - 0.5**0.6)
        assert mixes["v"][16] == pytest.approx(1 - 0.5**0.6 - 0.15)
        assert mixes["r"][16] == pytest.approx(1 - 0.5**0.3)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_official_decay_and_bonus(official: HybridLM, layer: int) -> None:
    branch = rwkv(official, layer)
    key, ratio_0_to_1 = branch.key_dim, layer / (LAYERS - 1)
    decay, bonus = [], []
    for n in range(key):
        decay.append(-6 + 5 * (n / (key - 1)) ** (0.7 + 1.3 * ratio_0_to_1))
        zigzag = ((n + 1) % 3 - 1) * 0.1
        bonus.append(ratio_0_to_1 * (1 - n / (key - 1)) + zigzag)
    close(branch.w_proj.linear.lora[2].bias, decay)
    close(branch.bonus, bonus)


def test_official_half_lives_are_2_to_280_tokens(official: HybridLM) -> None:
    """Of the decays that reach the recurrence, not of the parameters alone."""
    for block in official.blocks:
        x = torch.randn(2, 6, WIDTH)
        w = -torch.exp(block.rwkv.w_proj.linear(x))  # log decay a token; no mix matters, the low-rank part is 0
        half_lives = (math.log(0.5) / w).flatten(0, 1)
        assert half_lives.min().item() == pytest.approx(math.log(2) / math.exp(-1), rel=1e-4)  # 1.88
        assert half_lives.max().item() == pytest.approx(math.log(2) / math.exp(-6), rel=1e-4)  # 279.6
        assert (half_lives[0] == half_lives).all()
    first, last = (rwkv(official, layer).w_proj.linear.lora[2].bias for layer in (0, LAYERS - 1))
    assert (first >= last).all() and (first > last).any()  # later layers remember longer


def test_official_matrices_of_rwkv6(official: HybridLM) -> None:
    for block in official.blocks:
        branch = block.rwkv
        for projection, gain in ((branch.r_proj, 1), (branch.k_proj, 0.1), (branch.v_proj, 1), (branch.g_proj, 0.1)):
            weight = projection.linear.weight.detach().double()  # [out, in] with out <= in: orthonormal rows
            expected = gain**2 * torch.eye(weight.shape[0], dtype=torch.float64)
            torch.testing.assert_close(weight @ weight.T, expected, rtol=0, atol=1e-6)
        assert (branch.o_proj.weight == 0).all()
        low, high = branch.x_proj[0].linear.weight, branch.x_proj[2].weight
        assert (low == 0).all() and (branch.w_proj.linear.lora[0].weight == 0).all()
        for weight in (high, branch.w_proj.linear.lora[2].weight):
            assert 0.009 < weight.abs().max() <= 0.01
            assert weight.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.15)  # uniform


def test_official_matrix_with_more_rows_than_columns() -> None:
    """RWKV-LM scales the gain with sqrt(rows / columns) there."""
    model = build_model(small("model.pattern=R*2", "model.rwkv.expand_v=2.0"))
    weight = model.blocks[1].rwkv.v_proj.linear.weight.detach()
    assert weight.shape == (32, 16)
    torch.testing.assert_close(weight.T @ weight, 2 * torch.eye(16), rtol=0, atol=1e-5)


def test_official_group_norm(official: HybridLM) -> None:
    for layer, block in enumerate(official.blocks):
        norm = block.rwkv.g_norm
        assert norm.eps == pytest.approx(6.4e-4)
        close(norm.weight, np.full(WIDTH, ((1 + layer) / LAYERS) ** 0.7))
        assert (norm.bias == 0).all()


def test_official_start_of_a_single_layer_is_finite() -> None:
    model = build_model(small("model.pattern=R"))
    assert all(p.isfinite().all() for p in model.parameters())
    assert (model.blocks[0].rwkv.g_norm.weight == 1).all()


def test_official_branch_is_silent_and_learns(official: HybridLM) -> None:
    """The output projection is zero, so at step 0 it alone has a gradient; after a step of it all do."""
    model = build_model(small(*STACK))
    text = tokens(4, 24)

    def reached() -> set[str]:
        model.zero_grad()
        F.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
        return {name for name, p in model.blocks[1].rwkv.named_parameters() if p.grad.abs().sum() > 0}

    assert (official.blocks[1].rwkv(torch.randn(1, 5, WIDTH))[0] == 0).all()
    assert reached() == {"o_proj.weight"}
    with torch.no_grad():
        for block in model.blocks:
            block.rwkv.o_proj.weight -= block.rwkv.o_proj.weight.grad
    blocked = {"x_proj.2.weight", "w_proj.linear.lora.2.weight"}  # behind a low-rank factor that is still zero
    assert reached() == {name for name, _ in model.blocks[1].rwkv.named_parameters()} - blocked - {"x_proj.0.mu"}


# ---- Mamba-2, official


def test_official_steps_rates_and_skip_of_mamba2(official: HybridLM) -> None:
    dt = torch.cat([F.softplus(block.mamba.dt_bias.detach().double()) for block in official.blocks])
    assert (dt >= 0.001 * 0.999).all() and (dt <= 0.1 * 1.001).all()
    log_dt = dt.log()
    assert log_dt.mean().item() == pytest.approx((math.log(0.001) + math.log(0.1)) / 2, abs=0.5)
    assert log_dt.std().item() == pytest.approx(math.log(100) / math.sqrt(12), rel=0.25)  # uniform in the logarithm
    A = torch.cat([block.mamba.A_log.detach().exp() for block in official.blocks])
    assert (A >= 0.999).all() and (A <= 16.001).all()
    assert A.mean().item() == pytest.approx(8.5, abs=1.5) and A.std().item() == pytest.approx(15 / 12**0.5, rel=0.25)
    for block in official.blocks:
        assert (block.mamba.D == 1).all() and (block.mamba.norm.weight == 1).all()
        assert block.mamba.A_log.dtype == torch.float32


def test_official_matrices_of_mamba2(official: HybridLM) -> None:
    for block in official.blocks:
        branch = block.mamba
        bounds = {
            branch.in_proj.weight: 1 / math.sqrt(WIDTH),
            branch.conv1d.weight: 1 / math.sqrt(branch.conv_kernel_size),
            branch.conv1d.bias: 1 / math.sqrt(branch.conv_kernel_size),
            branch.out_proj.weight: 1 / math.sqrt(2 * WIDTH) / math.sqrt(2 * LAYERS),
        }
        for weight, bound in bounds.items():
            assert 0.93 * bound < weight.abs().max() <= bound * (1 + 1e-6)
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


# ---- the parts outside of the two branches


@pytest.mark.parametrize("init", ["official", "fla"])
def test_the_rest_is_the_same_under_both(init: str) -> None:
    model = build_model(config("model=tiny", "model.vocab_size=97", "model.pattern='P A A A'", f"init={init}"))
    stds = {"embedding": model.embedding.weight, "up": model.blocks[0].ffn.up.weight}
    stds["qkv"] = model.blocks[1].attention.qkv_proj.weight
    for name, weight in stds.items():
        assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    for weight in (model.blocks[0].ffn.down.weight, model.blocks[1].attention.o_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05)
    for block in model.blocks:
        assert (block.mix_norm.weight == 1).all() and (block.ffn_norm.weight == 1).all()
    assert (model.norm.weight == 1).all()


def test_init_changes_the_two_branches_and_nothing_else(official: HybridLM, fla: HybridLM) -> None:
    changed = {name for name, p in official.named_parameters() if not torch.equal(p, fla.get_parameter(name))}
    assert all(".rwkv." in name or ".mamba." in name for name in changed)
    for layer in range(LAYERS):
        assert f"blocks.{layer}.rwkv.x_bias" in changed and f"blocks.{layer}.mamba.out_proj.weight" in changed


# ---- FLA's own


def test_fla_branches_are_what_fla_constructs(fla: HybridLM) -> None:
    cfg = small(*STACK, "init=fla")
    r, m = cfg.model.rwkv, cfg.model.mamba
    for layer in range(LAYERS):
        with seeded(cfg.seed_init, f"blocks.{layer}.rwkv"):
            theirs = RWKV6Attention(
                hidden_size=WIDTH,
                num_heads=r.num_heads,
                expand_k=r.expand_k,
                proj_low_rank_dim=r.shift_low_rank,
                gate_low_rank_dim=r.decay_low_rank,
            )
        assert_equal(rwkv(fla, layer), theirs)
        with seeded(cfg.seed_init, f"blocks.{layer}.mamba"):
            theirs = FlaMamba2(
                hidden_size=WIDTH, head_dim=m.head_dim, state_size=m.state_size, expand=2, backend="triton"
            )
        assert_equal(mamba(fla, layer), theirs)


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Same names, shapes and values, none missing."""
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_fla_start_of_rwkv6_has_no_token_shift_and_a_short_memory(fla: HybridLM) -> None:
    """What makes the axis worth having: half of everything is forgotten within 0.7 tokens."""
    for block in fla.blocks:
        branch = block.rwkv
        for zero in (branch.x_bias, branch.x_proj[0].mu, branch.bonus, branch.w_proj.linear.lora[2].bias):
            assert (zero == 0).all()
        assert branch.g_norm.eps == 1e-5 and (branch.g_norm.weight == 1).all()
        assert branch.o_proj.weight.std() > 0.01
    assert math.log(2) / math.exp(0) == pytest.approx(0.69, abs=0.01)


def test_default_is_official() -> None:
    assert config("model=tiny").init.name == "official"


# ---- seeds


def test_seeded_draws_depend_on_seed_and_name_alone() -> None:
    def draw(seed: int, name: str) -> list[float]:
        with seeded(seed, name):
            return torch.rand(4).tolist()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    values = {(seed, name): draw(seed, name) for seed in (-1, 0, 1, 2**40) for name in ("a", "b", "1/a")}
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(draw(*key) == value for key, value in values.items())
    assert len({tuple(value) for value in values.values()}) == len(values)


def test_seeded_restores_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(0, "a"):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded(0, "a"):
        torch.rand(1)
    assert not seeds
