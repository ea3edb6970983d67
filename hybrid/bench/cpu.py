"""``python -m hybrid.bench cpu``: our recurrent branches against FLA's own CPU-capable code, and the training loop.

FLA's layers cannot be called as they are without a GPU (activation and norm are Triton kernels), so the Mamba-2 layer
gets plain PyTorch for these two and then runs its own ``torch_forward``.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from hybrid import kernels
from hybrid.bench.configure import configuration, smoke
from hybrid.bench.document import find
from hybrid.bench.session import Session
from hybrid.bench.show import Column, number, timed
from hybrid.bench.task import one_line
from hybrid.bench.worker import spread
from hybrid.schema import KernelsConfig, MambaConfig

MAMBA, WKV6, LOOP = "Mamba-2 branch", "wkv6", "training loop"
OURS, FLA = "ours", "FLA"
KINDER = "Mamba-2 branch, FLA given chunks of 64"  # not as it comes
COLUMNS: list[Column] = [
    ("what", lambda r: r["group"]),
    ("code", lambda r: r["name"]),
    ("ms (quartiles)", timed),
    ("x FLA", lambda r: number(r.get("factor"), ",.1f")),
    ("difference", lambda r: number(r.get("difference"), ".1e")),
    ("threads", lambda r: number(r.get("threads"), "d")),
    ("share", lambda r: number(r.get("share"), ".1%")),
]


class GatedNorm(nn.Module):
    """RMSNorm(y * silu(z)): what FLA's ``RMSNormGated`` computes, in PyTorch's own operators."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach().clone()), eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return F.rms_norm(y * F.silu(z), y.shape[-1:], self.weight, eps=self.eps)


def run(session: Session) -> None:
    options = session.options
    quick = options.quick
    repeats = options.repeats or (3 if quick else 7)
    session.document.note(
        "ours and FLA's take turns, forward and backward, float32, PyTorch's own allocator settings; "
        "difference: relative, of outputs; share: of the loop"
    )
    torch.set_num_threads(options.threads)
    parts: list[tuple[str, Callable[[], Any]]] = [
        (MAMBA, lambda: mamba(session, 16, 64, repeats)),
        (WKV6, lambda: [wkv6(session, batch, 256, repeats) for batch in (1, 16)]),
        (LOOP, lambda: loop(session)),
    ]
    for group, part in parts:
        if group not in options.parts:
            continue
        try:
            part()
        except Exception as error:
            session.add({"group": group, "name": OURS, "status": "failed", "reason": one_line(error)})
    for group, bound in ((MAMBA, 50), (WKV6, 8)):
        if group in options.parts:
            factors = {r["group"]: r["factor"] for r in session.document.rows if group in r["group"] and "factor" in r}
            kinder = factors.pop(KINDER, None)
            least = min(factors.values(), default=None)
            session.document.target(f"{group}: times FLA as it comes, the least", least, bound)
            if kinder is not None:
                session.document.note(f"{KINDER}: {kinder:.1f} times, which is not held against a target")
    if LOOP in options.parts:
        step = find(session.document.rows, LOOP, "forward, backward, optimiser")
        words = "share of the training loop inside forward, backward, optimiser"
        session.document.target(words, step["share"] if step else None, 0.7)
    session.table("on the CPU", COLUMNS)


def mamba(session: Session, batch: int, length: int, repeats: int) -> None:
    """One Mamba-2 branch of width 128."""
    import fla.layers.mamba2 as fla_mamba2

    from hybrid.branches.mamba2 import Mamba2

    torch.manual_seed(0)
    ours = Mamba2(128, MambaConfig(), KernelsConfig(ssd="torch")).train()
    theirs = copy.deepcopy(ours)
    theirs.act, theirs.norm = nn.SiLU(), GatedNorm(ours.norm.weight, ours.norm.eps)
    x = torch.randn(batch, length, 128)

    def forward_ours(x: Tensor) -> Tensor:
        return ours(x)[0]

    def forward_theirs(x: Tensor) -> Tensor:
        out = fla_mamba2.Mamba2.torch_forward(theirs, x)
        return out[0] if isinstance(out, tuple) else out

    group = f"{MAMBA} {batch} x {length} x 128"
    # FLA pads every sequence to whole chunks, of 256 steps as it comes.
    duel(session, group, forward_ours, forward_theirs, [x], repeats)
    theirs.chunk_size = 64
    duel(session, KINDER, forward_ours, forward_theirs, [x], repeats)


def wkv6(session: Session, batch: int, length: int, repeats: int) -> None:
    """The recurrence of the main model's RWKV-6 branch: 4 heads of 16 keys and 32 values."""
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    torch.manual_seed(0)
    H, K, V = 4, 16, 32
    r, k = torch.randn(batch, length, H, K), torch.randn(batch, length, H, K)
    v, w = torch.randn(batch, length, H, V), -torch.rand(batch, length, H, K).mul(4).sub(4).exp()
    u = torch.randn(H, K)

    def ours(*inputs: Tensor) -> Tensor:
        return kernels.wkv6(*inputs, backend="torch", output_final_state=False)[0]

    def theirs(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (r, k, v, w))
        return naive_recurrent_rwkv6(*heads_first, u, scale=1.0)[0].transpose(1, 2)

    duel(session, f"{WKV6} {batch} x {length}, 4 heads of 16 x 32", ours, theirs, [r, k, v, w, u], repeats)


def duel(
    session: Session, group: str, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor],
    repeats: int,
) -> None:  # fmt: skip
    """Time forward and backward of both in turns, so that a busy machine slows both."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        mine, other = ours(*leaves), theirs(*leaves)
    difference = ((mine - other).norm() / other.norm()).item()
    direction = torch.randn_like(mine)

    def once(f: Callable[..., Tensor]) -> float:
        for leaf in leaves:
            leaf.grad = None
        start = time.perf_counter()
        f(*leaves).backward(direction)
        return 1000 * (time.perf_counter() - start)

    def several(f: Callable[..., Tensor], number: int) -> float:
        return sum(once(f) for _ in range(number)) / number

    first, second = once(ours), once(theirs)  # and warm up
    inner = max(1, min(50, round(second / max(first, 1e-3))))
    times: dict[str, list[float]] = {OURS: [], FLA: []}
    for _ in range(repeats):
        times[OURS].append(several(ours, inner))
        times[FLA].append(several(theirs, 1))
    rows = {
        name: {"group": group, "name": name, "status": "ok", "unit": "ms", **spread(ms)} for name, ms in times.items()
    }
    rows[OURS] |= {"factor": rows[FLA]["median"] / rows[OURS]["median"], "difference": difference}
    for name in (OURS, FLA):
        session.add(rows[name] | {"threads": torch.get_num_threads()})


def loop(session: Session) -> None:
    """The training loop as it is, with the model, data and cadence of the sweep ``smoke``, and where its time goes.

    Only ``update`` (forward, backward, clipping, optimiser) and the validation of the trainer's own objects are
    wrapped by a clock; the rest is batches, logging, records and checkpoints.
    """
    from hybrid.progress import RunProgress
    from hybrid.run import check_data, plan
    from hybrid.start import import_training
    from hybrid.training.loop import Trainer
    from hybrid.training.member import Member

    options = session.options
    spent = {"update": 0.0, "validation": 0.0}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return timed_call

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        own = [*smoke(options.quick), *session.data, "trainer.device=cpu", f"out={folder}", "display.progress=off"]
        cfg = configuration([*own, *options.overrides])
        run = plan(cfg, check_data(cfg), "bench")
        import_training("cpu")
        run.folder.create(run.cfg, run.corpus)
        progress = RunProgress("bench", cfg.trainer.max_steps, cfg.display, run.folder.note)
        member = Member(run.cfg, run.corpus, run.folder, progress)
        trainer = Trainer(member)
        trainer.step.update = clocked("update", trainer.step.update)  # type: ignore[method-assign]
        member.evaluate = clocked("validation", member.evaluate)  # type: ignore[assignment]
        start = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - start
    training = whole - spent["validation"]
    steps = cfg.trainer.max_steps
    names = {
        "whole, without validation": training,
        "forward, backward, optimiser": spent["update"],
        "the rest of it": training - spent["update"],
    }
    threads = cfg.trainer.cpu_threads
    for name, seconds in names.items():
        ms = 1000 * seconds / steps
        row = {"group": LOOP, "name": name, "status": "ok", "unit": "ms a step", **spread([ms]), "threads": threads}
        session.add(row | {"share": seconds / training, "steps": steps, "seconds": seconds})
    session.document.content["loop"] = {
        "seconds": whole, "validation_seconds": spent["validation"], "update_seconds": spent["update"],
        "share_of_everything": (spent["update"] + spent["validation"]) / whole,
    }  # fmt: skip
    session.document.note(
        f"the loop took {whole:.1f} s for {steps} steps, {spent['validation']:.1f} s of it validation (forward only); "
        f"model and optimiser together are {(spent['update'] + spent['validation']) / whole:.1%} of everything"
    )
