"""One model, or several that differ only in their values: parameters as a few flat tensors, branches side by side.

A small model has hundreds of small parameters, and every one costs a kernel of its own wherever it is cast, clipped or
updated. Here those that are treated alike (part of the model, weight decay, precision) lie side by side in one leaf
[members, numbers]; the models' own parameters are views into it, so that evaluation and checkpoints see every update.
Members are independent: each has its own row in every leaf.

The kernels of a small model fill a fraction of a GPU. The two branches of a block do not wait for each other, so on
CUDA the second runs on a stream of its own, forward and (as autograd keeps to the streams of the forward) backward.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybrid.model import Block, HybridLM
from hybrid.training.optimizer import decays, group_of

# Every shape of branch, and of what follows one, is a compilation of its own of ``run``; the default allows 8.
torch._dynamo.config.recompile_limit = max(1024, torch._dynamo.config.recompile_limit)
torch._dynamo.config.accumulated_recompile_limit = max(4096, torch._dynamo.config.accumulated_recompile_limit)

SMALL_VOCABULARY = 256
PRODUCTS = 64  # at the same time, in which small matrices meet the steps of all members


@dataclass
class Leaf:
    """Parameters that are treated alike. ``half``: those that autocast would cast before every use.

    ``turned`` matrices lie in it column by column, as their gradients come: that of W in x W^T is (x^T dy)^T.
    """

    part: str
    decay: bool
    half: bool
    names: list[str]
    shapes: list[torch.Size]
    turned: list[bool]
    values: nn.Parameter  # [members, numbers]

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.shapes]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """By name, [members, *shape]."""
        pieces = flat.split(self.sizes, dim=1)
        return {
            name: piece.view(-1, *shape[::-1]).mT if turned else piece.view(-1, *shape)
            for name, turned, piece, shape in zip(self.names, self.turned, pieces, self.shapes, strict=True)
        }


class Stack:
    """``models`` on one device, of one shape. Their parameters become views of this stack's leaves."""

    def __init__(self, models: list[HybridLM], dtype: torch.dtype, compiled: bool) -> None:
        self.models, self.dtype = models, dtype
        template = models[0]
        linear = {
            f"{path}.{name}": parameter.ndim == 2 and not getattr(parameter, "_read_by_rows", False)
            for path, module in template.named_modules()
            if isinstance(module, nn.Linear)
            for name, parameter in module.named_parameters(recurse=False)
        }
        kinds: dict[tuple[str, bool, bool], list[str]] = {}
        for name, parameter in template.named_parameters():
            key = (group_of(name), decays(parameter), dtype != torch.float32 and name in linear)
            kinds.setdefault(key, []).append(name)
        own = [dict(model.named_parameters()) for model in models]
        self.leaves = []
        for (part, decay, half), names in kinds.items():
            turned = [half and linear[name] for name in names]
            rows = [
                torch.cat([(x.mT if turn else x).flatten() for x, turn in zip(parts, turned, strict=True)])
                for parts in ([named[name].detach() for name in names] for named in own)
            ]
            shapes = [own[0][name].shape for name in names]
            leaf = Leaf(part, decay, half, names, shapes, turned, nn.Parameter(torch.stack(rows)))
            for name, view in leaf.views(leaf.values.data).items():
                for named, member in zip(own, view.unbind(0), strict=True):
                    named[name].data = member
            self.leaves.append(leaf)
        # Of what does not wait for each other, such as the sums of many small gradients, one kernel.
        options = {"combo_kernels": True}
        self.run = torch.compile(run, fullgraph=True, dynamic=False, options=options) if compiled else run
        self.side = torch.cuda.Stream(self.leaves[0].values.device) if self.leaves[0].values.is_cuda else None
        # Blocks with the same parts run through the first of them, with their own values: one compilation serves all.
        shapes = [tuple((n, p.shape) for n, p in block.named_parameters()) for block in template.blocks]
        branches = [build_branches(block, dtype) for block in template.blocks]
        # The precisions in which branches take their input, the full one first.
        self.forms = sorted({branch.form for some in branches for branch in some}, key=lambda form: -form.itemsize)
        parts = [(some, After(some[0].block, self.forms)) for some in branches]
        self.blocks = [parts[shapes.index(shape)] for shape in shapes]

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
        norms = [values[f"blocks.{i}.mix_norm.weight"] for i in range(len(self.blocks))] + [values["norm.weight"]]
        normed = F.rms_norm(x, x.shape[-1:], eps=template.norm.eps) * norms[0][:, None, None]
        inputs = dict(zip(self.forms, (normed.to(form) for form in self.forms), strict=True))
        with kernels:
            for i, (branches, after) in enumerate(self.blocks):
                of = {part: {name: values[f"blocks.{i}.{name}"] for name in part.names} for part in (*branches, after)}
                outputs = self.branch_outputs([(branch, of[branch], inputs[branch.form]) for branch in branches])
                x, *normed = self.run(after, of[after], x, norms[i + 1], *outputs)
                inputs = dict(zip(self.forms, normed, strict=True))
        return many_by_few(inputs[self.forms[-1]], values["embedding.weight"].mT)

    def branch_outputs(self, calls: list[tuple[Branch, dict[str, Tensor], Tensor]]) -> list[Tensor]:
        """What every branch of a block makes of its input [members, B, T, d], with its values."""
        if self.side is None or len(calls) == 1:
            return [self.run(*call) for call in calls]
        _, values, n = calls[1]
        here = torch.cuda.current_stream(n.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            second = self.run(*calls[1])
        first = self.run(*calls[0])
        here.wait_stream(self.side)
        # Memory must not be used again before the other stream is through with it.
        for tensor in (n, *values.values()):
            tensor.record_stream(self.side)
        second.record_stream(here)
        return [first, second]

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
    V = weight.shape[1]
    if V > SMALL_VOCABULARY:
        return torch.stack([F.embedding(t, w) for t, w in zip(tokens, weight, strict=True)])
    is_token = tokens.unsqueeze(-1) == torch.arange(V, device=tokens.device)
    with torch.autocast(weight.device.type, enabled=False):
        return many_by_few(is_token.to(weight.dtype), weight)


def many_by_few(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight`` for x [members, B, T, k] and a weight [members, k, n] of each member.

    The gradient of a small weight is a few long sums, which libraries give to a few programs where there are several
    members: here in pieces, which are added up.
    """
    members, B, T = x.shape[:3]
    small = members > 1 and max(weight.shape[1:]) <= SMALL_VOCABULARY
    pieces = math.gcd(B * T, max(1, PRODUCTS // members)) if small else 1
    parts = weight.unsqueeze(1).expand(-1, pieces, -1, -1)
    return (x.reshape(members, pieces, -1, x.shape[-1]) @ parts).view(members, B, T, weight.shape[-1])


class Branch(nn.Module):
    """A branch of a block as a module, the block's names of its parameters, and the precision of its input."""

    def __init__(self, block: Block, name: str, form: torch.dtype) -> None:
        super().__init__()
        self.block, self.name, self.form = block, name, form
        self.names = [path for path, _ in block.named_parameters() if path.split(".")[0] == name]

    def forward(self, n: Tensor) -> Tensor:
        return getattr(self.block, self.name)(n)[0]


def build_branches(block: Block, dtype: torch.dtype) -> list[Branch]:
    """The branches of a block that computes in ``dtype``.

    An input that only goes into linear layers, which would cast it, is cast where it comes from; not so for two such
    branches, so that the gradients of their input are added in full precision.
    """
    linear = [getattr(block, name).only_linear for name in block.branches]
    forms = [dtype if only and linear.count(True) == 1 else torch.float32 for only in linear]
    return [Branch(block, name, form) for name, form in zip(block.branches, forms, strict=True)]


class After(nn.Module):
    """What follows the branches of a block, and the norm with which the next block or the head begins.

    Gives the normed output in every precision of ``forms``.
    """

    def __init__(self, block: Block, forms: list[torch.dtype]) -> None:
        super().__init__()
        self.block, self.forms = block, forms
        before = (*block.branches, "mix_norm")
        self.names = [path for path, _ in block.named_parameters() if path.split(".")[0] not in before]

    def forward(self, x: Tensor, norm: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        x, _ = self.block.after(x, outputs)
        normed = F.rms_norm(x, x.shape[-1:], norm, self.block.mix_norm.eps)
        return x, *(normed.to(form) for form in self.forms)


def run(part: nn.Module, values: dict[str, Tensor], *inputs: Tensor) -> Any:
    """``Branch`` or ``After`` with other values than its block's, for every member: [members, ...] in and out."""

    def one(values: dict[str, Tensor], *inputs: Tensor) -> Any:
        own = {f"block.{name}": value for name, value in values.items()}
        return functional_call(part, own, inputs, tie_weights=False)  # none are; to look for some takes time to compile

    if inputs[0].shape[0] > 1:
        return torch.vmap(one, randomness="different")(values, *inputs)
    found = one({name: value.squeeze(0) for name, value in values.items()}, *(x.squeeze(0) for x in inputs))
    return found.unsqueeze(0) if isinstance(found, Tensor) else tuple(x.unsqueeze(0) for x in found)
