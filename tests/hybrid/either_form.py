"""What tests of operators with kernels and a plain form share: they hold whichever serves.

``test_triton_interpreted.py`` runs them a second time, in Triton's interpreter, where the kernels serve on a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def on_devices(cpu: float, cuda: float, half: float) -> list[Any]:
    """Device, dtype and the relative error to stay below: float32 on both kinds, bfloat16 on a GPU."""
    cases = [
        pytest.param("cpu", "float32", cpu, id="cpu"),
        pytest.param("cuda", "float32", cuda, id="cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", half, id="cuda-bf16", marks=pytest.mark.gpu),
    ]
    return cases[:1] if INTERPRETED else cases


def backend_for(device: str) -> str:
    return "triton" if INTERPRETED else "auto" if device == "cuda" else "torch"
