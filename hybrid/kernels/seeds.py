"""``torch.vmap`` over custom operators: several models of one shape in one kernel call.

Every tensor that goes into or comes out of an operator here has the batch as its first axis, or, for what a model
holds itself (bonus, decay rate, skip, filters, weights), the models: row m serves the m-th of equal parts of the
batch. So stacked models are one larger batch, and nothing that is stacked is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_seeds(op: Callable) -> None:
    """Give a custom operator of the kind above its rule for ``torch.vmap``."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        def fold(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            stacked = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return stacked.flatten(0, 1)

        outputs = op(*(fold(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (info.batch_size, -1)), 0
        # An output that was not asked for is empty and stays so.
        unused = [x.shape == (0,) for x in outputs]
        unfolded = tuple(
            x.expand(info.batch_size, 0) if empty else x.unflatten(0, (info.batch_size, -1))
            for x, empty in zip(outputs, unused, strict=True)
        )
        return unfolded, (0,) * len(unfolded)

    torch.library.register_vmap(op, rule)


def by_model(sums: Tensor, models: int, own: int = 1) -> Tensor:
    """[models,...]: what sequences or programs, equally many of each model and those of one together, have to add up.

    ``own`` is how many last axes a sum has. Not for operators: outside of them a compiler can fuse it.
    """
    return sums.view(models, -1, *sums.shape[-own:]).sum(1)


def to_heads(x: Tensor, models: int) -> Tensor:
    """[models*B,T,H,...] -> [B,T,models*H,...], for kernels that know one set of per-head weights only (a copy)."""
    return x.contiguous() if models == 1 else x.unflatten(0, (models, -1)).movedim(0, 2).flatten(2, 3).contiguous()


def from_heads(x: Tensor, models: int) -> Tensor:
    """The inverse of ``to_heads``."""
    return x if models == 1 else x.unflatten(2, (models, -1)).movedim(2, 0).flatten(0, 1).contiguous()


def state_to_heads(x: Tensor, models: int) -> Tensor:
    """[models*B,H,...] -> [B,models*H,...]."""
    return x if models == 1 else x.unflatten(0, (models, -1)).movedim(0, 1).flatten(1, 2).contiguous()


def state_from_heads(x: Tensor, models: int) -> Tensor:
    """The inverse of ``state_to_heads``."""
    return x if models == 1 else x.unflatten(1, (models, -1)).movedim(1, 0).flatten(0, 1).contiguous()
