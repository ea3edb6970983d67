"""``python -m hybrid.bench memory``: does every preset train within the memory budget, and with how many micro-batches?

The process is held to the budget, so a row that fits has trained in it. Where it does not, the batch is cut into 2, 4,
... micro-batches, and the need without a limit is measured as well.
"""

from __future__ import annotations

from collections.abc import Callable

from hybrid.bench.gpu import COMMON
from hybrid.bench.session import Session
from hybrid.bench.show import Column, number
from hybrid.bench.task import Row, Task

PRESETS = {
    "hybrid_5m": "5.2M", "hybrid_6m": "6.5M", "hybrid_8m": "8M", "transformer": "5.2M", "rwkv6": "5.2M",
    "mamba2": "5.2M",
}  # fmt: skip
STEPS = 6  # the CUDA graph is recorded in the fourth
COLUMNS: list[Column] = [
    ("batch x T", lambda r: r["group"]),
    ("model", lambda r: r["name"]),
    ("parameters", lambda r: number(r.get("params"), ",d")),
    ("GiB in one step", lambda r: number(scaled(r, "whole_bytes"))),
    ("micro-batches", lambda r: number(r.get("grad_accum"), "d")),
    ("GiB then", lambda r: number(scaled(r, "peak_memory_bytes"))),
    ("GiB reserved", lambda r: number(scaled(r, "peak_reserved_bytes"))),
    ("tokens/s", lambda r: number(r.get("tokens_per_second"), ",.0f")),
    ("fits", lambda r: "yes" if r.get("fits") else "no"),
]


def scaled(row: Row, key: str) -> float | None:
    return row[key] / 2**30 if row.get(key) is not None else None


def run(session: Session) -> None:
    options, document = session.options, session.document
    rows, length = options.shape
    budget = round(options.budget_gb * 1e9)
    document.note(f"budget: {options.budget_gb:g} GB (10^9 bytes) for all that PyTorch takes on the device")
    for preset in options.models:
        base = [f"model={preset}", *session.data, *COMMON, f"data.seq_len={length}", "trainer.device=cuda",
                f"model.target_params={PRESETS[preset]}", *options.overrides]  # fmt: skip

        def attempt(parts: int, limit: int | None, preset: str = preset, base: list[str] = base) -> Row:
            settings = [f"trainer.batch_size={rows // parts}", f"trainer.grad_accum={parts}"]
            group = f"{rows} x {length}"
            return session.runner(
                Task(group, preset, base + settings, loss_steps=STEPS, seconds=0.2, memory_limit=limit)
            )

        row = session.document.add(fit(attempt, rows, budget))
        session.say(f"{row['group']}, {row['name']}: {row['status']} {row.get('reason') or 'fits'}")
    good = [row for row in document.rows if row.get("fits")]
    document.target("presets that train within the budget", len(good), len(options.models))
    session.table(f"peak memory against {options.budget_gb:g} GB", COLUMNS)


def fit(attempt: Callable[[int, int | None], Row], rows: int, budget: int) -> Row:
    """The row of the fewest micro-batches, a power of two, with which a batch of ``rows`` trains within ``budget``.

    ``attempt(parts, limit)`` measures one cut of the batch. ``whole_bytes`` is the peak of the uncut batch without a
    limit, as far as the device holds it.
    """
    parts = 1
    while True:
        row = attempt(parts, budget)
        fits = row["status"] == "ok" and row["peak_memory_bytes"] <= budget
        out_of_memory = row["status"] == "ok" or "OutOfMemory" in str(row.get("reason"))
        if fits or not out_of_memory or parts * 2 > rows or rows % (parts * 2):
            break
        parts *= 2
    whole = row if parts == 1 else attempt(1, None)
    row |= {"grad_accum": parts, "fits": fits, "budget_bytes": budget, "whole_bytes": whole.get("peak_memory_bytes")}
    if row["status"] == "ok":
        gib = row["peak_memory_bytes"] / 2**30
        row |= {"speed": {key: row[key] for key in ("median", "q1", "q3", "times")}, "unit": "GiB at the peak"}
        row |= {"median": gib, "q1": gib, "q3": gib, "times": [gib]}
        if not fits:
            row |= {"status": "failed", "reason": f"needs {gib:.2f} GiB with {parts} micro-batches"}
    return row
