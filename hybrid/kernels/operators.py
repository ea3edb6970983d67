"""Custom operators under names that tell their versions apart.

PyTorch's caches on disk hold compiled graphs in which an operator is a name: one that was compiled for an earlier form
of it, with results of another shape, would be found again. So the name has a hash of the code here.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent


@functools.cache
def sources_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def operator(name: str, folder: Path = HERE) -> Callable:
    """``torch.library.custom_op`` for a function that changes none of its inputs, of the code in ``folder``."""
    return torch.library.custom_op(f"groundthink::{name}_{sources_hash(folder)}", mutates_args=())
