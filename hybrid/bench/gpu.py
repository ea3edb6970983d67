"""``python -m hybrid.bench gpu``: training steps of the main model on one GPU, every way that there is to run them."""

from __future__ import annotations

from hybrid.arguments import plain_key
from hybrid.bench.document import find
from hybrid.bench.floor import FORMULA
from hybrid.bench.session import Session
from hybrid.bench.show import Column, number, timed
from hybrid.bench.task import Row, Task

SHAPES = ("64x64", "64x256", "32x1024", "8x4096")
EAGER, GRAPH, AUTO, SEEDS, CONTROL = "plain eager", "graph", "compile + graph", "8 seeds together", "transformer"
WAYS = {"eager": EAGER, "graph": GRAPH, "auto": AUTO, "seeds": SEEDS, "transformer": CONTROL}
OPTIONS = {
    EAGER: ["trainer.compile=false", "trainer.cuda_graph=false"],
    GRAPH: ["trainer.compile=false", "trainer.cuda_graph=true"],
    AUTO: ["trainer.compile=true", "trainer.cuda_graph=true"],
    SEEDS: ["trainer.compile=true", "trainer.cuda_graph=true"],
    CONTROL: ["trainer.compile=true", "trainer.cuda_graph=true"],
}
DEVIATION = 0.05  # nats per token by which a faster path may differ from the plain one
COMMON = ["schedule=constant", "schedule.warmup_steps=10", "optim.lr=1e-3", "trainer.max_steps=10000000",
          "trainer.grad_accum=1", "display.progress=off"]  # fmt: skip
OF_THE_HYBRID = ("model", "model.pattern", "model.target_params")  # overrides that the transformer does not share
COLUMNS: list[Column] = [
    ("batch x T", lambda r: r["group"]),
    ("how", lambda r: r["name"]),
    ("ms a step (quartiles)", timed),
    ("tokens/s", lambda r: number(r.get("tokens_per_second"), ",.0f")),
    ("x eager", lambda r: number(r.get("factor_eager"), ",.1f")),
    ("x transf.", lambda r: number(r.get("factor_transformer"))),
    ("x floor", lambda r: number(r.get("factor_floor"), ",.1f")),
    ("GiB", lambda r: number(gib(r), ",.2f")),
    ("first step s", lambda r: f"{number(r.get('first_step_seconds'), '.0f')} {r.get('cache', '')}"),
    ("loss", lambda r: number(r.get("loss"), ".3f")),
    ("deviation", lambda r: number(r.get("deviation"), "+.4f") + (" !" if r.get("deviates") else "")),
]


def gib(row: Row) -> float | None:
    return row["peak_memory_bytes"] / 2**30 if row.get("peak_memory_bytes") is not None else None


def run(session: Session) -> None:
    options, document = session.options, session.document
    bandwidth = session.device["copy_gb_per_s"]
    steps = options.steps or (30 if options.quick else 100)
    document.note(f"floor: {FORMULA}; over the copy bandwidth measured here, {bandwidth:,.0f} GB/s")
    document.note(
        f"loss: mean of the last tenth of the first {steps} steps, deviation from the plain eager path on the same "
        f"batches (! above {DEVIATION}); GiB: peak allocated after the first step"
    )
    document.note(of_first_steps(session.device))
    for shape in options.shapes:
        batch, length = shape
        group = f"{batch} x {length}"
        base = [*session.data, *COMMON, f"trainer.batch_size={batch}", f"data.seq_len={length}",
                "trainer.dtype=bfloat16", "trainer.device=cuda"]  # fmt: skip
        hybrid = ["model=hybrid_5m", "fusion=gated", *base, *options.overrides]
        rows = []
        for way in options.rows:
            name = WAYS[way]
            if way == "seeds" and not (shape == (64, 64) or options.seeds_everywhere):
                continue
            model = hybrid
            if way == "transformer":
                target = session.parameters(hybrid)
                others = [o for o in options.overrides if plain_key(o) not in OF_THE_HYBRID]
                model = ["model=transformer", f"model.target_params={target}", *base, *others]
            task = Task(
                group, name, [*model, *OPTIONS[name]], members=8 if way == "seeds" else 1, loss_steps=steps,
                seconds=0.2 if options.quick else 0.5,
            )  # fmt: skip
            rows.append(session.measure(task))
            relate(rows, bandwidth)
    judge(session)
    session.table(" ".join(["training steps: hybrid_5m, gated, bfloat16", *options.overrides]), COLUMNS)


def of_first_steps(device: Row) -> str:
    """What the seconds to a first step are, and whether they have more in them than a first step needs."""
    note = "first step: seconds from starting the process, caches of compiled kernels warm, cold or in part"
    if device.get("bytecode", True):
        return note
    return (
        f"{note}; Python keeps no bytecode of torch here, so each process compiles thousands of modules again: "
        "PYTHONPYCACHEPREFIX names a folder for it, PYTHONDONTWRITEBYTECODE must not be set"
    )


def relate(rows: list[Row], bandwidth: float) -> None:
    """Add to the rows of one shape how they stand to each other and to the floor."""
    good = {row["name"]: row for row in rows if row["status"] == "ok"}
    for row in good.values():
        floor = row["necessary_bytes"] / (bandwidth * 1e9) * 1000
        row["floor_ms"], row["factor_floor"] = floor, row["median"] / floor
        if CONTROL in good:
            row["factor_transformer"] = row["tokens_per_second"] / good[CONTROL]["tokens_per_second"]
        if EAGER in good and row["name"] != CONTROL:
            plain = good[EAGER]
            row["factor_eager"] = row["tokens_per_second"] / plain["tokens_per_second"]
            row["deviation"] = row["loss"] - plain["loss"]
            row["deviates"] = abs(row["deviation"]) > DEVIATION
        if AUTO in good and row["name"] == SEEDS:
            row["cost_in_runs"] = row["median"] / good[AUTO]["median"]


def judge(session: Session) -> None:
    """The targets, as far as their shapes were measured."""
    document = session.document

    def value(group: str, name: str, key: str) -> float | None:
        row = find(document.rows, group, name)
        return None if row is None else row.get(key)

    asked = {f"{batch} x {length}" for batch, length in session.options.shapes}
    wanted = [
        ("64 x 64", AUTO, "factor_eager", "times the plain eager loop", 25, False),
        ("64 x 64", AUTO, "tokens_per_second", "tokens/s", 900e3, False),
        ("64 x 256", AUTO, "tokens_per_second", "tokens/s", 2e6, False),
        ("64 x 64", AUTO, "factor_transformer", "of the transformer's speed", 0.6, False),
        ("64 x 256", AUTO, "factor_transformer", "of the transformer's speed", 0.6, False),
        ("8 x 4096", AUTO, "factor_transformer", "of the transformer's speed", 1.0, False),
        ("64 x 64", SEEDS, "cost_in_runs", "8 seeds cost this many runs", 2.5, True),
        ("64 x 64", SEEDS, "tokens_per_second", "8 seeds, tokens/s", 2.5e6, False),
    ]
    for group, name, key, words, bound, at_most in wanted:
        if group in asked:
            document.target(f"{group}: {words}", value(group, name, key), bound, at_most)
    if "64 x 64" in asked:
        eager, auto = (value("64 x 64", name, "peak_memory_bytes") for name in (EAGER, AUTO))
        share = auto / eager if auto is not None and eager else None
        document.target("64 x 64: peak memory as a share of the eager path's", share, 1.0, at_most=True)
    for row in document.rows:
        if row["status"] == "ok" and row["name"] == AUTO and row.get("cache") in ("cold", "warm"):
            bound = 45 if row["cache"] == "cold" else 8
            words = f"{row['group']}: seconds to the first step, cache {row['cache']}"
            document.target(words, row["first_step_seconds"], bound, at_most=True)
