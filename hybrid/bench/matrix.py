"""``python -m hybrid.bench matrix``: the specification's B1 to B3 and its optimisations, one change at a time."""

from __future__ import annotations

from hybrid.bench.document import find
from hybrid.bench.gpu import COMMON, DEVIATION, gib
from hybrid.bench.session import Session
from hybrid.bench.show import Column, number, timed
from hybrid.bench.task import Row, Task

PLAIN = {"trainer.batch_size": 8, "trainer.dtype": "float32", "trainer.compile": "false", "trainer.cuda_graph": "false"}
BASELINE, ALL = "baseline", "all"
CHANGES = {
    BASELINE: {},
    "batch 16": {"trainer.batch_size": 16},
    "batch 64": {"trainer.batch_size": 64},
    "bfloat16": {"trainer.dtype": "bfloat16"},
    "compile": {"trainer.compile": "true"},
    "graph": {"trainer.cuda_graph": "true"},
    ALL: {"trainer.batch_size": 64, "trainer.dtype": "bfloat16", "trainer.compile": "true",
          "trainer.cuda_graph": "true"},
}  # fmt: skip
GROUP = "optimisations"
MEMORY = 1000 * 2**20  # bytes, of B2
COLUMNS: list[Column] = [
    ("", lambda r: r["group"]),
    ("change", lambda r: r["name"]),
    ("ms a step (quartiles)", timed),
    ("tokens/s", lambda r: number(r.get("tokens_per_second"), ",.0f")),
    ("x baseline", lambda r: number(r.get("factor"))),
    ("GiB", lambda r: number(gib(r), ",.3f")),
    ("loss", lambda r: number(r.get("loss"), ".3f")),
    ("deviation", lambda r: number(r.get("deviation"), "+.4f") + (" !" if r.get("deviates") else "")),
]


def run(session: Session) -> None:
    options, document = session.options, session.document
    steps = options.steps or (20 if options.quick else 1000)
    base = ["model=hybrid_5m", "fusion=gated", "data.seq_len=64", *session.data, *COMMON, *options.overrides]
    base[:0] = ["trainer.device=cuda"] if session.cuda else ["trainer.device=cpu", "trainer.cpu_threads=1"]
    document.note("loader workers and pinned memory do not apply: batches are gathered on the device (or in memory)")
    document.note(
        f"loss: mean of the last tenth of {steps} steps; deviation from the baseline, ! above {DEVIATION} (of a larger "
        "batch, which sees other text, upwards only)"
    )
    if not session.cuda:
        document.note(
            "on a CPU with one thread (trainer.cpu_threads); GiB: growth of the process from before the model is built"
        )
    for name, change in CHANGES.items():
        if not session.cuda and name in ("compile", "graph", ALL):
            session.skip(GROUP, name, "CUDA only")
            continue
        if options.quick and name == "batch 64" and not session.cuda:
            session.skip(GROUP, name, "left out by --quick")
            continue
        settings = [f"{key}={value}" for key, value in (PLAIN | change).items()]
        seconds = 0.1 if options.quick else 0.5
        session.measure(Task(GROUP, name, [*base, *settings], loss_steps=steps, seconds=seconds))
        relate(document.rows)
    judge(session)
    session.table(f"optimisations, {steps} steps each, against batch 8 x 64 in float32, eager", COLUMNS)


def relate(rows: list[Row]) -> None:
    plain = find(rows, GROUP, BASELINE)
    for row in rows:
        if plain is None or row["status"] != "ok":
            continue
        row["factor"] = row["tokens_per_second"] / plain["tokens_per_second"]
        row["deviation"] = row["loss"] - plain["loss"]
        other_text = row["tokens_per_step"] != plain["tokens_per_step"]
        row["deviates"] = (row["deviation"] if other_text else abs(row["deviation"])) > DEVIATION


def judge(session: Session) -> None:
    document = session.document
    plain, best = (find(document.rows, GROUP, name) for name in (BASELINE, ALL))
    document.content["b1_tokens_per_second"] = plain["tokens_per_second"] if plain else None
    document.content["b2_peak_memory_bytes"] = peak = plain["peak_memory_bytes"] if plain else None
    mib = None if peak is None else peak / 2**20
    document.target("B2: peak memory at 8 x 64, MiB", mib, MEMORY / 2**20, at_most=True)
    losses = plain["losses"] if plain else []
    fell = (sum(losses[:10]) - sum(losses[90:100])) / 10 if len(losses) >= 100 else None
    document.target("B3: fall of the loss in 100 steps (tens of steps), nats per token", fell, 0.0)
    if session.cuda:
        document.target("all together: times the baseline", best["factor"] if best else None, 5)
