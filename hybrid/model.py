"""``HybridLM``: embedding, a stack of blocks, a norm, a head tied to the embedding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hybrid.branches import BranchState
from hybrid.branches.attention import Attention
from hybrid.branches.mamba2 import Mamba2
from hybrid.branches.rwkv6 import RWKV6
from hybrid.fusion import build_fusion
from hybrid.init import init_model, initial_seed, seeded
from hybrid.padding import linear_of_wide, wide_linear
from hybrid.pattern import branches_of
from hybrid.schema import Config
from hybrid.sizes import ffn_hidden, vocab_size

BlockState = dict[str, BranchState]


class FeedForward(nn.Module):
    """Linear, GELU, Linear; no biases. A width that is solved for a number of parameters is any number."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = wide_linear(x, self.up) if x.is_cuda else self.up(x)
        return linear_of_wide(F.gelu(hidden), self.down)


class Block(nn.Module):
    """``x + mix(norm(x))``, then ``x + ffn(norm(x))``.

    ``mix`` is one branch or two branches on the same input and their fusion; ``kinds`` says which. Branches
    are attributes named for what they are: ``rwkv``, ``mamba``, ``attention``; two of a kind are ``rwkv_a`` and
    ``rwkv_b``.
    """

    def __init__(self, kinds: tuple[str, ...], cfg: Config, hidden: int, path: str) -> None:
        super().__init__()
        model, seed = cfg.model, initial_seed(cfg)
        twins = len(kinds) == 2 and kinds[0] == kinds[1]
        self.branches = tuple(f"{name}_{'ab'[i]}" if twins else name for i, name in enumerate(kinds))
        for name, branch in zip(self.branches, kinds, strict=True):
            with seeded(seed, f"{path}.{name}"):
                self.add_module(name, build_branch(branch, cfg))
        if len(kinds) == 2:
            with seeded(seed, f"{path}.fusion"):
                self.fusion = build_fusion(model.d_model, cfg.fusion, self.branches)
        self.mix_norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        self.ffn_norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        with seeded(seed, f"{path}.ffn"):
            self.ffn = FeedForward(model.d_model, hidden)
        self.dropout = nn.Dropout(model.dropout)
        # None, and so without any cost, where no branch is ever left out.
        self.branch_dropout = tuple(model.branch_dropout) if any(model.branch_dropout) else None

    def initial_state(self, batch: int) -> BlockState:
        parts = self.branches + (("fusion",) if len(self.branches) == 2 else ())
        return {name: getattr(self, name).initial_state(batch) for name in parts}

    def forward(self, x: Tensor, state: BlockState | None = None) -> tuple[Tensor, BlockState | None]:
        n = self.mix_norm(x)
        new: BlockState = {}
        outputs = []
        for name in self.branches:
            out, new[name] = getattr(self, name)(n, None if state is None else state[name])
            outputs.append(out)
        if len(outputs) == 1 or state is None:
            return self.after(x, outputs)[0], None if state is None else new
        x, new["fusion"] = self.after(x, outputs, state["fusion"])
        return x, new

    def after(
        self, x: Tensor, outputs: Sequence[Tensor], state: BranchState | None = None
    ) -> tuple[Tensor, BranchState | None]:
        """The rest of the block, once the branches have given their ``outputs`` for ``mix_norm(x)``."""
        if len(outputs) == 2:
            if self.training and self.branch_dropout is not None:
                outputs = drop_branches(*outputs, self.branch_dropout)
            mixed, state = self.fusion(*outputs, state)
        else:
            (mixed,) = outputs
        x = x + self.dropout(mixed)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), state


def drop_branches(a: Tensor, b: Tensor, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """``a``, ``b`` [B,T,d] where some sequences have zeros in place of the one or the other, never of both.

    ``shares`` are the probabilities for the first and the second. What is left is not scaled up, unlike in dropout:
    it is the very output that is fused in evaluation, so that a sequence of which nothing is dropped trains the
    function that is evaluated, the others what it would be without that branch; a gate does not add its inputs, so no
    factor would keep its mean; and a branch may be left out always (1).
    """
    draw = torch.rand(a.shape[0], 1, 1, device=a.device)
    without_a = draw < shares[0]
    without_b = (draw >= 1 - shares[1]) & ~without_a
    return a.masked_fill(without_a, 0), b.masked_fill(without_b, 0)


class HybridLM(nn.Module):
    """A language model whose blocks follow ``cfg.model.pattern``.

    Built on the CPU. Every part draws its initial values from a generator of its own, seeded by ``seed_init`` and
    the part's name: two arms with the same seed start with the same values wherever they have the same part.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        hidden = ffn_hidden(cfg)
        with seeded(initial_seed(cfg), "embedding"):
            self.embedding = nn.Embedding(vocab_size(cfg), cfg.model.d_model)
        self.dropout = nn.Dropout(cfg.model.dropout)
        stack = branches_of(cfg.model.pattern, cfg.model.branches)
        self.blocks = nn.ModuleList(Block(kinds, cfg, hidden, f"blocks.{i}") for i, kinds in enumerate(stack))
        self.norm = nn.RMSNorm(cfg.model.d_model, eps=cfg.model.norm_eps)
        init_model(self, cfg)

    def initial_state(self, batch: int) -> list[BlockState]:
        """The state before the first token, for ``model(tokens, state)``."""
        return [block.initial_state(batch) for block in self.blocks]

    def forward(
        self, tokens: Tensor, state: list[BlockState] | None = None
    ) -> Tensor | tuple[Tensor, list[BlockState]]:
        """Logits [B,T,V] for tokens [B,T]; with a state, ``(logits, state)``.

        Feeding a sequence in pieces, each with the state that the last call returned, gives the logits of one call.
        """
        x = self.dropout(self.embedding(tokens))
        new = []
        for i, block in enumerate(self.blocks):
            x, block_state = block(x, None if state is None else state[i])
            new.append(block_state)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return logits if state is None else (logits, new)


def copied(model: HybridLM) -> HybridLM:
    """A deep copy, with what layers note on their parameters, such as ``_no_weight_decay``: PyTorch's forgets it."""
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        vars(mine).update(vars(theirs))
    return twin


def build_branch(name: str, cfg: Config) -> nn.Module:
    if name == "rwkv":
        return RWKV6(cfg.model.d_model, cfg.model.rwkv, cfg.kernels)
    if name == "mamba":
        return Mamba2(cfg.model.d_model, cfg.model.mamba, cfg.kernels)
    return Attention(cfg.model.d_model, cfg.model.attention)


def count_built(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of a built model by part, in the terms of ``hybrid.sizes.count_params``."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = component(name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def component(parameter_name: str) -> str:
    """The part of the model that a parameter belongs to: rwkv, mamba, attention, fusion, ffn, norm or embedding."""
    names = parameter_name.split(".")
    if names[0] != "blocks":
        return names[0]
    part = names[2].removesuffix("_a").removesuffix("_b")
    return "norm" if part.endswith("_norm") else part


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model computes in ``dtype`` on ``device``; float32 switches autocast off."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
