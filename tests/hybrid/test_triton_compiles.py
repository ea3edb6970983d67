"""The Triton kernels in the shapes and types of training, compiled for an H100 without one.

Triton's interpreter (``test_triton_interpreted.py``) runs Python: it takes what the compiler refuses, such as a name
that changes its type in a loop.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hybrid.kernels import (  # noqa: E402
    adamw_triton,
    carry,
    conv_triton,
    ddlerp_linear_triton,
    ddlerp_triton,
    norms_triton,
    ssd_programs,
    ssd_triton,
    wkv6_programs,
)

H100 = GPUTarget("cuda", 90, 32)
HALF = {"r", "k", "v", "o", "do", "dr", "dk", "dv", "x", "y", "dx", "dy", "B", "C", "dB", "dC", "dstates"}
HALF |= {"gate", "dgate"}
HALF |= {f"{name}{k}" for name in ("y", "dy") for k in range(5)}
EVEN = {"*bf16", "*fp32", "i32"}
LOW = {"low", "dlow", "weight", "delta", "ddelta", "shifted", "ds", *(f"p{k}" for k in range(5))}
NUMBERS = {"weight_decay", "beta2", "log_beta1", "log_beta2", "one_minus_beta1", "one_minus_beta2", "eps", "max_norm"}
NUMBERS |= {"norm_eps"}
WKV6 = {"C": 16, "LEVELS": 3, "BK": 16, "BV": 32, "AHEAD": 64, "PRECISION": "tf32", "GIVEN": False, "RAW": True}
SSD = {"RAW": True, "L": 64, "BP": 64, "BN": 128}
NOT_RAW = {**SSD, "RAW": False}
DDLERP = {"PRECISION": "tf32", "MIXES": 5, "STEPS": 64, "BD": 128, "BR": 32}


def linear(D: int, R: int, dtype: torch.dtype, **lying: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and options as the fused token shift is launched with."""
    low = torch.empty(0, dtype=dtype)
    found = ddlerp_linear_triton._constants(D, R, low) | ddlerp_linear_triton._of_projections([D], low)
    options = {key: found.pop(key) for key in ("num_warps", "num_stages")}
    return found | lying, options


LINEAR, AHEAD = linear(128, 32, torch.bfloat16, TURNED=True, ALIGNED=True)
HIGH_RANK, _ = linear(128, 64, torch.bfloat16, TURNED=False, ALIGNED=False)
IN_FULL, ALONG = linear(64, 64, torch.float32, TURNED=False, ALIGNED=True)
PARTS = {"PRECISION": "tf32", "STEPS": 64, "BK": 16, "BV": 32, "RAW": True}
ENDS = {"BN": 64, "OUTER": True, "LAST": True, "LEFT": False}
CARRY = {"OUTER": True, "LAST": True, "PARTS": 8, "NUMBERS": 256}
ALONE = {"INITIAL": False, "FINAL": False}
WITH_STATE = {"INITIAL": True, "FINAL": True}
FLAT = {"num_stages": 1}
HEADS = {"GATE_FIRST": False, "ROWS": 16, "BC": 32}
WHOLE = {"GATE_FIRST": True, "ROWS": 2, "BC": 256}
CASES: dict[str, tuple[Any, dict[str, Any], set[str], dict[str, int]]] = {
    # kernel, constants, tensors that are absent, what it is launched with
    "wkv6 forward": (
        wkv6_programs.wkv6_forward_kernel, {**WKV6, **ALONE, "SAVE": True}, {"initial", "starts", "final"},
        {"num_warps": 1, **FLAT},
    ),
    "wkv6 forward, states given": (
        wkv6_programs.wkv6_forward_kernel, {**WKV6, **WITH_STATE, "SAVE": True, "GIVEN": True}, set(),
        {"num_warps": 1, **FLAT},
    ),
    "wkv6 parts": (wkv6_programs.wkv6_parts_kernel, {**PARTS, "BACK": False}, set(), {"num_warps": 2}),
    "wkv6 backward": (
        wkv6_programs.wkv6_backward_kernel, {**WKV6, **ALONE}, {"dfinal", "ends", "dinitial"}, {"num_warps": 1, **FLAT}
    ),
    "wkv6 backward, states given": (
        wkv6_programs.wkv6_backward_kernel, {**WKV6, **WITH_STATE, "GIVEN": True}, set(), {"num_warps": 1, **FLAT}
    ),
    "wkv6 backward, float32, wide": (
        wkv6_programs.wkv6_backward_kernel,
        {**WKV6, **WITH_STATE, "PRECISION": "tf32x3", "BK": 32, "BV": 64, "RAW": False}, {"ends"},
        {"num_warps": 4, **FLAT},
    ),
    "wkv6 parts back": (wkv6_programs.wkv6_parts_kernel, {**PARTS, "BACK": True}, set(), {"num_warps": 2}),
    "ssd steps": (ssd_programs.ssd_steps_kernel, {"ROWS": 64, "BH": 16}, set(), {"num_warps": 4}),
    "ssd forward, one chunk": (
        ssd_programs.ssd_forward_kernel, {**SSD, "SKIP": True, "STATE": False}, {"borders"}, {"num_warps": 4, **FLAT}
    ),
    "ssd forward": (
        ssd_programs.ssd_forward_kernel, {**NOT_RAW, "SKIP": False, "STATE": True}, {"D"},
        {"num_warps": 4, **FLAT},
    ),
    "ssd walk": (ssd_programs.ssd_walk_kernel, {**NOT_RAW, **ENDS, "BACK": False}, set(), {"num_warps": 4}),
    "ssd parts": (
        ssd_programs.ssd_walk_kernel, {**SSD, **ENDS, "OUTER": False, "LEFT": True, "BACK": False}, {"outer"},
        {"num_warps": 4},
    ),
    "ssd carry": (carry.carry_kernel, {**CARRY, "BACK": False}, set(), {"num_warps": 1}),
    "ssd carry back": (carry.carry_kernel, {**CARRY, "BACK": True}, set(), {"num_warps": 1}),
    "wkv6 carry": (carry.carry_kernel, {**CARRY, "BACK": True, "LAST": False}, set(), {"num_warps": 1}),
    "ssd backward, one chunk": (
        ssd_programs.ssd_backward_kernel, {**SSD, "SKIP": True, "STATE": False}, {"borders", "dstates"},
        {"num_warps": 4, "maxnreg": ssd_triton.REGISTERS, **FLAT},
    ),
    "ssd backward": (
        ssd_programs.ssd_backward_kernel, {**SSD, "SKIP": True, "STATE": True}, set(), {"num_warps": 4, **FLAT}
    ),
    "ssd backward without a skip": (
        ssd_programs.ssd_backward_kernel, {**NOT_RAW, "SKIP": False, "STATE": True}, {"D"},
        {"num_warps": 4, **FLAT},
    ),
    "ssd backward, shared, one chunk": (
        ssd_programs.ssd_shared_backward_kernel, {**SSD, "STATE": False}, {"borders", "dstates"},
        {"num_warps": 4, **FLAT},
    ),
    "ssd backward, shared": (
        ssd_programs.ssd_shared_backward_kernel, {**SSD, "STATE": True}, set(), {"num_warps": 4, **FLAT}
    ),
    "ssd walk back": (ssd_programs.ssd_walk_kernel, {**SSD, **ENDS, "BACK": True}, set(), {"num_warps": 4}),
    "ddlerp forward": (ddlerp_triton._ddlerp_forward_kernel, DDLERP, set(), {"num_warps": 8}),
    "ddlerp backward": (ddlerp_triton._ddlerp_backward_kernel, DDLERP, set(), {"num_warps": 8}),
    "ddlerp backward, widest": (
        ddlerp_triton._ddlerp_backward_kernel, {**DDLERP, "STEPS": 16, "BD": 256, "BR": 64}, set(), {"num_warps": 8}
    ),
    "ddlerp sums": (ddlerp_triton._ddlerp_sums_kernel, {**DDLERP, "STEPS": 32}, set(), {"num_warps": 4}),
    "ddlerp sums, widest": (
        ddlerp_triton._ddlerp_sums_kernel, {**DDLERP, "STEPS": 32, "BD": 256, "BR": 64}, set(), {"num_warps": 8}
    ),
    "ddlerp linear mixed": (
        ddlerp_linear_triton._ddlerp_linear_mixed_kernel, {**DDLERP, "STEPS": 16}, set(),
        {"num_warps": 4, "num_stages": 2},
    ),
    "ddlerp linear forward": (ddlerp_linear_triton._ddlerp_linear_forward_kernel, LINEAR, set(), AHEAD),
    "ddlerp linear backward": (ddlerp_linear_triton._ddlerp_linear_backward_kernel, LINEAR, set(), AHEAD),
    "ddlerp linear forward, widest": (
        ddlerp_linear_triton._ddlerp_linear_forward_kernel, HIGH_RANK, set(), AHEAD,
    ),
    "ddlerp linear backward, widest": (
        ddlerp_linear_triton._ddlerp_linear_backward_kernel, HIGH_RANK, set(), AHEAD,
    ),
    "ddlerp linear forward, in full": (
        ddlerp_linear_triton._ddlerp_linear_forward_kernel, IN_FULL, set(), ALONG,
    ),
    "ddlerp linear backward, in full": (
        ddlerp_linear_triton._ddlerp_linear_backward_kernel, IN_FULL, set(), ALONG,
    ),
    "norm then gate": (norms_triton._gated_norm_forward_kernel, HEADS, set(), {"num_warps": 1}),
    "norm then gate, backward": (norms_triton._gated_norm_backward_kernel, HEADS, set(), {"num_warps": 1}),
    "gate then norm": (norms_triton._gated_norm_forward_kernel, WHOLE, {"bias"}, {"num_warps": 1}),
    "gate then norm, backward": (norms_triton._gated_norm_backward_kernel, WHOLE, {"bias"}, {"num_warps": 1}),
    "norm then gate, backward, narrowest": (
        norms_triton._gated_norm_backward_kernel, {**HEADS, "ROWS": 32, "BC": 16}, set(), {"num_warps": 1},
    ),
    "gate then norm, backward, widest": (
        norms_triton._gated_norm_backward_kernel, {**WHOLE, "ROWS": 4, "BC": 512}, {"bias"}, {"num_warps": 4},
    ),
    "adamw squares": (adamw_triton._squares_kernel, {"BLOCK": 1024}, set(), {"num_warps": 4}),
    "adamw": (adamw_triton._adamw_kernel, {"BLOCK": 1024, "CLIP": True}, set(), {"num_warps": 4}),
    "conv forward": (conv_triton._conv_forward_kernel, {"STEPS": 8, "BC": 128}, set(), {"num_warps": 2}),
    "conv backward": (conv_triton._conv_backward_kernel, {"STEPS": 16, "BC": 128}, set(), {"num_warps": 1}),
}  # fmt: skip
IN_FLOAT32 = ["ddlerp forward", "ddlerp backward", "ddlerp backward, widest", "ddlerp sums", "ddlerp sums, widest"]
IN_FLOAT32 += ["ddlerp linear mixed", "ddlerp linear forward, in full", "ddlerp linear backward, in full"]
IN_FLOAT32 += ["norm then gate, backward, narrowest", "gate then norm, backward, widest"]


@pytest.mark.parametrize(
    "case, wide", [*((case, False) for case in CASES if "in full" not in case), *((case, True) for case in IN_FLOAT32)]
)
def test_compiles(case: str, wide: bool) -> None:
    kernel, constants, absent, options = CASES[case]
    op = case.split()[0].rstrip(",")
    half = HALF | {"wkv6": {"a", "b"}, "ssd": {"borders", "states", "dscores", "ddt"}, "ddlerp": LOW}.get(op, set())
    if wide:
        half, options = set(), options | FLAT
        constants = {key: "tf32x3" if key == "PRECISION" else value for key, value in constants.items()}
    signature, constexprs = {}, {}
    for index, name in enumerate(kernel.arg_names):
        tensor = name.removesuffix("_ptr")
        if name in constants or tensor in absent:
            signature[name], constexprs[(index,)] = "constexpr", constants.get(name)
        elif name.endswith("_ptr"):
            # ssd keeps its states in the inputs' precision.
            signature[name] = "*bf16" if tensor in half else "*fp32"
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
    # As where sizes and addresses are multiples of 16, which makes loads wide enough to be under way in shared memory.
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] in EVEN}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs, even), target=H100, options=options)
    assert compiled.asm["cubin"]
    most = 99 if case.startswith("ddlerp linear") else 227  # KiB that a program can have: on an RTX 4090, and an H100
    assert compiled.metadata.shared <= most * 1024
