"""The parameters of one model, or of several that differ only in their values, as a few flat tensors.

A small model has hundreds of small parameters, and every one costs a kernel of its own wherever it is cast, clipped or
updated. Here those that are treated alike (part of the model, weight decay, precision) lie side by side in one leaf
[members, numbers]; the models' own parameters are views into it, so that evaluation and checkpoints see every update.
Members are independent: each has its own row in every leaf.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybrid.model import HybridLM
from hybrid.training.optimizer import decays, group_of

# Every shape of block that a process trains is a compilation of its own of ``run_block``; the default allows 8.
torch._dynamo.config.recompile_limit = max(1024, torch._dynamo.config.recompile_limit)
torch._dynamo.config.accumulated_recompile_limit = max(4096, torch._dynamo.config.accumulated_recompile_limit)

SMALL_VOCABULARY = 256


@dataclass
class Leaf:
    """Parameters that are treated alike. ``half``: matrices that autocast would cast before every use."""

    part: str
    decay: bool
    half: bool
    names: list[str]
    shapes: list[torch.Size]
    values: nn.Parameter  # [members, numbers]

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """By name, [members, *shape]."""
        pieces = flat.split(self.sizes, dim=1)
        return {n: p.view(-1, *s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}


class Stack:
    """``models`` on one device, of one shape. Their parameters become views of this stack's leaves."""

    def __init__(self, models: list[HybridLM], dtype: torch.dtype, compiled: bool) -> None:
        self.models, self.dtype = models, dtype
        template = models[0]
        linear = {
            f"{path}.{name}"
            for path, module in template.named_modules()
            if isinstance(module, nn.Linear)
            for name, _ in module.named_parameters(recurse=False)
        }
        kinds: dict[tuple[str, bool, bool], list[str]] = {}
        for name, parameter in template.named_parameters():
            key = (group_of(name), decays(parameter), dtype != torch.float32 and name in linear)
            kinds.setdefault(key, []).append(name)
        own = [dict(model.named_parameters()) for model in models]
        self.leaves = []
        for (part, decay, half), names in kinds.items():
            rows = [torch.cat([named[name].detach().flatten() for name in names]) for named in own]
            leaf = Leaf(
                part, decay, half, names, [own[0][name].shape for name in names], nn.Parameter(torch.stack(rows))
            )
            for name, view in leaf.views(leaf.values.data).items():
                for named, member in zip(own, view.unbind(0), strict=True):
                    named[name].data = member
            self.leaves.append(leaf)
        self.forward_block = torch.compile(run_block, fullgraph=True, dynamic=False) if compiled else run_block
        # Blocks with the same parts run through the first of them, with their own values: one compilation serves all.
        shapes = [tuple((n, p.shape) for n, p in block.named_parameters()) for block in template.blocks]
        self.templates = [template.blocks[shapes.index(shape)] for shape in shapes]

    @property
    def members(self) -> int:
        return len(self.models)

    def values(self) -> dict[str, Tensor]:
        """Every parameter by name, [members, *shape], those of ``half`` leaves cast; gradients flow to the leaves."""
        found = {}
        for leaf in self.leaves:
            found |= leaf.views(leaf.values.to(self.dtype) if leaf.half else leaf.values)
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [members, B, T, V] for tokens [members, B, T]."""
        values = self.values()
        template = self.models[0]
        x = template.dropout(embed(tokens, values["embedding.weight"]))
        # The backward of memory-efficient attention does not run under vmap (the other kernels' does).
        kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if self.members > 1 else nullcontext()
        with kernels:
            for i, block in enumerate(self.templates):
                own = {name: values[f"blocks.{i}.{name}"] for name, _ in block.named_parameters()}
                x = self.forward_block(block, own, x)
        scale = values["norm.weight"][:, None, None]
        x = F.rms_norm(x, x.shape[-1:], eps=template.norm.eps) * scale
        return torch.einsum("mbtd,mvd->mbtv", x, values["embedding.weight"])

    def norms(self, member: int) -> Tensor:
        """One member's gradient norms, in the order of ``names``."""
        pieces = [view[member] for leaf in self.leaves for view in leaf.views(leaf.values.grad).values()]
        return torch.stack(torch._foreach_norm(pieces))

    @property
    def names(self) -> list[str]:
        return [name for leaf in self.leaves for name in leaf.names]


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows [members, B, T, d] of each member's embedding [members, V, d].

    Of a small vocabulary as a product with ones and zeros: exact, and its gradient is a product as well, where that of
    a look-up sorts the tokens first.
    """
    V, d = weight.shape[1:]
    if V > SMALL_VOCABULARY:
        return torch.stack([F.embedding(t, w) for t, w in zip(tokens, weight, strict=True)])
    is_token = tokens.flatten(1).unsqueeze(-1) == torch.arange(V, device=tokens.device)
    with torch.autocast(weight.device.type, enabled=False):
        return (is_token.to(weight.dtype) @ weight).view(*tokens.shape, d)


def run_block(block: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """A block with other values than its own, for every member: [members, B, T, d] in and out."""

    def one(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, values, (x,))[0]

    if x.shape[0] == 1:
        return one({name: value.squeeze(0) for name, value in values.items()}, x.squeeze(0)).unsqueeze(0)
    return torch.vmap(one, randomness="different")(values, x)
