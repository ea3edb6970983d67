"""A profiler's trace by regions of the model: time, launches, and the gaps between. Reads Chrome JSON; no torch.

On a GPU the regions are those of the kernels' names, so a replayed CUDA graph is told apart as well as single launches.
On a CPU they are those of operators: what ran inside an annotation (``ANNOTATED``) or in its backward pass belongs to
it, the rest goes by name. Times are self times, so nothing counts twice; kernels that run side by side count
each, so regions can add up to more than the wall.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

RWKV, SSD, BOTH = "rwkv recurrence", "ssd recurrence", "rwkv or ssd recurrence"
MATMUL, ATTENTION, FUSED, OPTIMISER = "matmul", "attention", "elementwise, reduction", "optimiser, clipping"
LOSS, COPIES, OTHER = "embedding, loss", "copies", "other"
ORDER = (RWKV, SSD, BOTH, ATTENTION, MATMUL, FUSED, OPTIMISER, LOSS, COPIES, OTHER)
WHOLE = "profiled steps"  # the annotation around them

# The first that is found in a kernel's name decides.
KERNELS = (
    (ATTENTION, r"flash|fmha|attention"),
    (MATMUL, r"^triton_tem|^triton_mm|gemm|cutlass|nvjet|xmma|gemv|splitk|cublas|^_ddlerp_linear_(for|back)ward"),
    (FUSED, r"^triton_(poi|red|per|for)|^_conv_|^_ddlerp_"),
    (RWKV, r"wkv6|rwkv|chunk_gla"),
    (SSD, r"ssd|chunk_scan|chunk_state|state_passing|bmm_chunk|chunk_cumsum"),
    (BOTH, r"^_(forward|backward)_kernel$|^carry_kernel"),
    (OPTIMISER, r"adam|multi_tensor|lpnorm|lp_norm"),
    (LOSS, r"embedding|softmax|nll_loss|cross_entropy|index|gather|scatter"),
    (COPIES, r"memcpy|memset|copy|cat(array)?batched|fill"),
    (FUSED, r"elementwise|reduce|norm"),
)
OPERATORS = (
    (MATMUL, r"aten::(mm|addmm|bmm|baddbmm|matmul|linear|einsum)$"),
    (ATTENTION, r"attention"),
    (OPTIMISER, r"_foreach|_fused_adam"),
    (LOSS, r"embedding|softmax|nll_loss|cross_entropy|index_select|gather"),
    (COPIES, r"aten::(copy_|clone|contiguous|to|_to_copy|cat|stack|fill_|zero_|zeros|zeros_like|empty.*)$"),
    (FUSED, r"^aten::"),
)
ANNOTATED = {RWKV: RWKV, SSD: SSD}  # annotation -> region; the optimiser's own begins with "Optimizer."


@dataclass
class Region:
    name: str
    microseconds: float = 0.0
    launches: int = 0


@dataclass
class Breakdown:
    """Times in microseconds over all profiled steps. ``gaps`` is wall minus the time in which anything ran."""

    kind: str  # kernels | operators
    wall: float
    busy: float
    regions: list[Region]

    @property
    def gaps(self) -> float:
        return max(0.0, self.wall - self.busy)


def by_name(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    return next((region for region, pattern in patterns if re.search(pattern, name, re.IGNORECASE)), OTHER)


def analyse(trace: dict[str, Any]) -> Breakdown:
    """The regions of a trace that ``torch.profiler`` exported. Raises ``ValueError`` without the annotated steps."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    whole = [e for e in events if e["name"] == WHOLE and e.get("cat") == "user_annotation"]
    if not whole:
        raise ValueError(f"the trace has no annotation '{WHOLE}'")
    begin, wall = whole[0]["ts"], whole[0]["dur"]
    inside = [e for e in events if begin <= e["ts"] < begin + wall]
    device = [e for e in inside if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device:
        found = [(by_name(e["name"], KERNELS), e["dur"]) for e in device]
        return Breakdown("kernels", wall, union([(e["ts"], e["ts"] + e["dur"]) for e in device]), totals(found))
    found = operators([e for e in inside if e.get("cat") in ("cpu_op", "user_annotation") and e is not whole[0]])
    return Breakdown("operators", wall, sum(time for _, time in found), totals(found))


def totals(found: list[tuple[str, float]]) -> list[Region]:
    regions = {name: Region(name) for name in ORDER}
    for name, time in found:
        regions[name].microseconds += time
        regions[name].launches += 1
    return [region for region in regions.values() if region.launches]


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what the spans cover; they may overlap, as kernels on several streams do."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def operators(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Region and self time of every operator, thread by thread."""
    inherited: dict[int, str] = {}  # autograd's sequence number -> region of the forward pass
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        threads.setdefault(event.get("tid"), []).append(event)
    nested = [nest(own) for own in threads.values()]
    for tree in nested:
        for event, _, parents in tree:
            number, region = event.get("args", {}).get("Sequence number"), annotated(parents)
            if number is not None and region is not None:
                inherited.setdefault(number, region)
    found = []
    for tree in nested:
        for event, self_time, parents in tree:
            if event["cat"] != "cpu_op":
                continue
            region = annotated(parents)
            for one in (*parents, event):
                number = one.get("args", {}).get("Sequence number")
                if region is None and one["name"].startswith("autograd::engine") and number in inherited:
                    region = inherited[number]
            found.append((region or by_name(event["name"], OPERATORS), self_time))
    return found


def annotated(parents: list[dict[str, Any]]) -> str | None:
    for event in reversed(parents):
        if event["cat"] == "user_annotation":
            if event["name"].startswith("Optimizer."):
                return OPTIMISER
            if event["name"] in ANNOTATED:
                return ANNOTATED[event["name"]]
    return None


def nest(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float, list[dict[str, Any]]]]:
    """Every event of one thread with its self time and the events around it, the outermost first."""
    found: list[tuple[dict[str, Any], list[float], list[dict[str, Any]]]] = []
    stack: list[tuple[dict[str, Any], list[float]]] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while stack and event["ts"] >= stack[-1][0]["ts"] + stack[-1][0]["dur"]:
            stack.pop()
        parents = [one for one, _ in stack]
        own = [float(event["dur"])]
        if stack and event["cat"] == "cpu_op":  # an annotation takes no time of its own
            for one, time in reversed(stack):
                if one["cat"] == "cpu_op":
                    time[0] -= event["dur"]
                    break
        found.append((event, own, parents))
        stack.append((event, own))
    return [(event, max(0.0, own[0]), parents) for event, own, parents in found]
