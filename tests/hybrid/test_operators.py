"""Custom operators as PyTorch's compiler and its caches see them; those of Triton are in ``triton_cases.py``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("op", ["wkv6", "ssd", "conv"])
def test_plain_operators_keep_their_promises(op: str) -> None:
    """PyTorch's own check of schemas and of shapes without data, which compilation relies on."""
    module = importlib.import_module(f"hybrid.kernels.{op}")
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(8))  # noqa: E731
    shapes = {
        "wkv6": [(2, 2, 3, 8, 6)] * 2 + [(2, 2, 3, 8, 5), (2, 2, 3, 8, 6), (1, 2, 6)],
        "ssd": [(2, 4, 3, 8, 6), (2, 4, 3, 8), (2, 2, 3, 8, 5), (2, 2, 3, 8, 5)],
        "conv": [(2, 9, 6), (1, 6, 4), (1, 6)],
    }[op]
    inputs = [draw(*shape) for shape in shapes]
    if op == "conv":
        calls = [(*inputs, 9), (*inputs, 6)]
    else:
        decays = 3 if op == "wkv6" else 1
        inputs[decays] = -inputs[decays].abs().to(torch.float32 if op == "wkv6" else torch.float64)
        state = draw(2, 2, 6, 5) if op == "wkv6" else draw(2, 4, 6, 5)
        one = [x[:, :, :1].contiguous() if x.dim() > 3 else x for x in inputs]
        calls = [(*inputs, state, True), (*inputs, None, False), (*one, None, False)]
    for call in calls:
        leaves = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in call]
        torch.library.opcheck(module._forward, leaves)
        results = module._forward(*call)
        backward = [*inputs[:2], draw(*results.shape)] if op == "conv" else [*call[: len(inputs)], results[2]]
        if op != "conv":
            backward += [draw(*results[0].shape), results[1] if call[-1] else None]
        torch.library.opcheck(module._backward, backward, test_utils=("test_schema", "test_faketensor"))


def test_compiled_graphs_are_those_of_the_present_operators(tmp_path: Path) -> None:
    """A cached graph, also one compiled in another thread, is not found again when an operator in it has changed."""
    program = """
import sys, threading, torch
from pathlib import Path
from hybrid.kernels.operators import operator
@operator("rows", Path(sys.argv[2]))
def rows(x: torch.Tensor) -> torch.Tensor:
    return x.new_ones(int(sys.argv[1]), 3)
@rows.register_fake
def _(x):
    return x.new_empty(int(sys.argv[1]), 3)
def compiled():
    print(torch.compile(lambda x: rows(x).sum())(torch.ones(2)).item())
compiled()
torch.compiler.reset()
thread = threading.Thread(target=compiled)
thread.start(), thread.join()
"""
    operators = tmp_path / "operators"
    operators.mkdir()

    def compiled(rows: int) -> str:
        (operators / "rows.py").write_text(f"ROWS = {rows}\n")
        command = [sys.executable, "-c", program, str(rows), str(operators)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert compiled(2) == "6.0\n6.0\n"
    assert compiled(4) == "12.0\n12.0\n"
