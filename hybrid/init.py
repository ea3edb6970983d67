"""Initialisation. ``official`` follows the authors' code of both layers; ``fla`` leaves the layers as FLA makes them.

It is an axis of its own because it can be worth more than a fusion: FLA's RWKV-6 starts with no token shift and a
half-life of 0.7 tokens, the official one with half-lives from 2 to 280.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from hybrid.schema import Config

if TYPE_CHECKING:
    from hybrid.branches.mamba2 import Mamba2
    from hybrid.branches.rwkv6 import RWKV6
    from hybrid.model import HybridLM

STD = 0.02  # of embeddings and of the matrices outside the two recurrent branches, as in GPT-2


def initial_seed(cfg: Config) -> str:
    """What the initial values are drawn from: ``seed_init`` and, where it is set, ``init.stream``."""
    return str(cfg.seed_init) if cfg.init.stream is None else f"{cfg.seed_init}.{cfg.init.stream}"


@contextlib.contextmanager
def seeded(seed: int | str, name: str) -> Iterator[None]:
    """Random numbers inside depend on ``seed`` and ``name`` alone, and leave the outer generator as it was."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # leaves CUDA's generators alone
    try:
        yield
    finally:
        torch.set_rng_state(before)


@torch.no_grad()
def init_model(model: HybridLM, cfg: Config) -> None:
    """Set the values of everything but the fusions, which set their own, and, for ``fla``, the two branches."""
    from hybrid.branches.attention import Attention
    from hybrid.branches.mamba2 import Mamba2
    from hybrid.branches.rwkv6 import RWKV6

    layers, seed = len(model.blocks), initial_seed(cfg)
    # Every block adds twice to the residual stream; its last matrices shrink so that the sum keeps its size.
    depth_scale = 1 / math.sqrt(2 * layers)
    with seeded(seed, "embedding"):
        nn.init.normal_(model.embedding.weight, std=STD)
    for index, block in enumerate(model.blocks):
        with seeded(seed, f"blocks.{index}.ffn"):
            nn.init.normal_(block.ffn.up.weight, std=STD)
            nn.init.normal_(block.ffn.down.weight, std=STD * depth_scale)
        for name in block.branches:
            branch = getattr(block, name)
            with seeded(seed, f"blocks.{index}.{name}"):
                if isinstance(branch, Attention):
                    nn.init.normal_(branch.qkv_proj.weight, std=STD)
                    nn.init.normal_(branch.o_proj.weight, std=STD * depth_scale)
                elif cfg.init.name == "official" and isinstance(branch, RWKV6):
                    init_rwkv6(branch, index, layers)
                elif cfg.init.name == "official" and isinstance(branch, Mamba2):
                    init_mamba2(branch, depth_scale)


@torch.no_grad()
def init_rwkv6(branch: RWKV6, layer: int, layers: int) -> None:
    """The x060 initialisation of RWKV-LM (RWKV-v5/src/model.py, class RWKV_Tmix_x060, and its generate_init_weight).

    ``layer`` counts from 0. Key channels run over key_dim where the original has it equal to the width.
    """
    width, key = branch.hidden_size, branch.key_dim
    up = layer / max(layers - 1, 1)  # 0 at the first layer, 1 at the last
    down = 1 - layer / layers  # 1 at the first layer, towards 0
    depth = torch.arange(width) / width
    shift = 1 - depth**down
    branch.x_proj[0].mu.copy_(shift)
    mixes = {"r": 1 - depth ** (0.5 * down), "w": shift, "k": shift, "v": 1 - (depth**down + 0.3 * up)}
    mixes["g"] = mixes["r"]
    branch.x_bias.copy_(torch.stack([mixes[name] for name in "rwkvg"]))  # FLA's order

    channel = torch.arange(key)
    ratio = channel / max(key - 1, 1)
    branch.w_proj.linear.lora[2].bias.copy_(-6 + 5 * ratio ** (0.7 + 1.3 * up))
    zigzag = ((channel + 1) % 3 - 1) * 0.1
    branch.bonus.copy_((up * (1 - ratio) + zigzag).view_as(branch.bonus))

    for low, high in ((branch.x_proj[0].linear, branch.x_proj[2]), branch.w_proj.linear.lora[::2]):
        nn.init.zeros_(low.weight)
        nn.init.uniform_(high.weight, -0.01, 0.01)
    for projection, gain in ((branch.r_proj, 1.0), (branch.k_proj, 0.1), (branch.v_proj, 1.0), (branch.g_proj, 0.1)):
        weight = projection.linear.weight
        rows, columns = weight.shape
        nn.init.orthogonal_(weight, gain=gain * math.sqrt(max(1, rows / columns)))
    nn.init.zeros_(branch.o_proj.weight)

    branch.g_norm.eps = 64e-5
    nn.init.constant_(branch.g_norm.weight, ((1 + layer) / layers) ** 0.7)
    nn.init.zeros_(branch.g_norm.bias)


@torch.no_grad()
def init_mamba2(branch: Mamba2, depth_scale: float) -> None:
    """The initialisation of state-spaces/mamba (modules/mamba2.py and _init_weights of mixer_seq_simple.py)."""
    low, high = math.log(branch.dt_min), math.log(branch.dt_max)
    dt = torch.exp(torch.empty(branch.num_heads).uniform_(low, high)).clamp_min(1e-4)
    branch.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
    branch.A_log.copy_(torch.empty(branch.num_heads).uniform_(*branch.A_init_range).log())
    nn.init.ones_(branch.D)
    branch.conv1d.reset_parameters()
    branch.in_proj.reset_parameters()
    nn.init.ones_(branch.norm.weight)
    nn.init.kaiming_uniform_(branch.out_proj.weight, a=math.sqrt(5))
    branch.out_proj.weight.mul_(depth_scale)
