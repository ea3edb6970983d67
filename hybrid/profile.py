"""Where a training step's time goes: ``python -m hybrid.profile [overrides...] [--steps N] [--out DIR]``.

Writes a trace of a few steps of any configuration (Chrome JSON, for ui.perfetto.dev or chrome://tracing) and a table
of regions: kernels on a GPU, operators on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.arguments import Parser, describe, fail, override

if TYPE_CHECKING:
    from hybrid.bench.regions import Breakdown
    from hybrid.schema import Config

SCHEMA = "groundthink.profile/1"
BEFORE = 6  # steps before anything is timed: kernels are compiled and the CUDA graph is recorded
EXAMPLE = "example: python -m hybrid.profile model=hybrid_5m trainer.batch_size=64 trainer.grad_accum=1 data.seq_len=64"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m hybrid.profile", description="Profile a few training steps.", epilog=EXAMPLE, allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", type=override, help="key=value, as for hybrid.train")
    parser.add_argument("--steps", type=int, default=5, help="profiled steps (5)")
    parser.add_argument("--members", type=int, default=1, help="runs that train together, seeds 0 to K-1 (1)")
    parser.add_argument("--out", type=Path, default=Path("outputs/profile"), help="folder (outputs/profile)")
    options = parser.parse_intermixed_args(arguments)
    for name in ("steps", "members"):
        if getattr(options, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(options, name)}")
    from hybrid.bench.__main__ import check_overrides
    from hybrid.bench.configure import configuration
    from hybrid.config import ConfigError
    from hybrid.data import DataError
    from hybrid.run import check_machine

    try:
        check_overrides(options.overrides)
        cfgs = [
            configuration([*options.overrides, f"seed_init={k}", f"seed_data={k}"] if k else options.overrides)
            for k in range(options.members)
        ]
        check_machine(cfgs[0])
        options.out.mkdir(parents=True, exist_ok=True)
        profile(cfgs, options)
    except (ConfigError, DataError) as error:
        fail(str(error))
    except OSError as error:
        fail(describe(error))
    except KeyboardInterrupt:
        fail("interrupted", 130)


def profile(cfgs: list[Config], options: argparse.Namespace) -> None:
    """Run, write trace and table, and print the table."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    from hybrid import build_model
    from hybrid.bench.configure import settle
    from hybrid.bench.regions import WHOLE, analyse
    from hybrid.device import clock_of, serving_kernels
    from hybrid.files import write_text_atomically
    from hybrid.records import environment
    from hybrid.training.step import build_step

    corpus = settle(cfgs)
    trainer = cfgs[0].trainer
    device = torch.device(trainer.device)
    cuda = device.type == "cuda"

    clock = clock_of(device)
    stem = f"{cfgs[0].model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    trace_path = options.out / f"{stem}.trace.json"
    with contextlib.nullcontext() if cuda or trainer.compile else marked():
        step = build_step(cfgs, [build_model(cfg).to(device) for cfg in cfgs], corpus)
        for number in range(1, BEFORE + 1):
            step.run(number)
        start = clock()
        for number in range(BEFORE + 1, BEFORE + 1 + options.steps):
            step.run(number)
        plain = clock() - start
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with torch.profiler.profile(activities=activities) as recorder:
            clock()
            with record_function(WHOLE):
                for number in range(BEFORE + 1 + options.steps, BEFORE + 1 + 2 * options.steps):
                    step.run(number)
                clock()
    recorder.export_chrome_trace(str(trace_path))
    found = analyse(json.loads(trace_path.read_text()))
    name = torch.cuda.get_device_name(device) if cuda else "cpu"
    record = {
        "schema": SCHEMA,
        "overrides": options.overrides,
        "members": options.members,
        "steps": options.steps,
        "step": type(step).__name__,
        "ms_a_step_unprofiled": 1000 * plain / options.steps,
        **plain_data(found, options.steps),
        "environment": environment(name, serving_kernels(cfgs[0])),
    }
    path = options.out / f"{stem}.json"
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")
    show(record)
    print(f"trace: {trace_path}, table: {path}")


def plain_data(found: Breakdown, steps: int) -> dict[str, Any]:
    """A breakdown as milliseconds a step."""
    return {
        "kind": found.kind,
        "wall_ms": found.wall / steps / 1000,
        "busy_ms": found.busy / steps / 1000,
        "gaps_ms": found.gaps / steps / 1000,
        "regions": [
            {
                "name": region.name,
                "ms": region.microseconds / steps / 1000,
                "launches": region.launches / steps,
                "share": region.microseconds / found.wall,
            }
            for region in found.regions
        ],
    }


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    kind = record["kind"]
    table = Table(title=f"a training step by region ({kind}, per step)", title_justify="left", header_style="bold")
    table.add_column("region")
    for head in ("ms", kind, "share of wall"):
        table.add_column(head, justify="right")
    for region in record["regions"]:
        table.add_row(region["name"], f"{region['ms']:.3f}", f"{region['launches']:,.0f}", f"{region['share']:.1%}")
    table.add_section()
    table.add_row(
        "gaps (wall less busy)", f"{record['gaps_ms']:.3f}", "", f"{record['gaps_ms'] / record['wall_ms']:.1%}"
    )
    table.add_row("wall, profiled", f"{record['wall_ms']:.3f}", "", "")
    table.add_row("wall, not profiled", f"{record['ms_a_step_unprofiled']:.3f}", "", "")
    Console().print(table)


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """The recurrences annotated: on a CPU they are ordinary operators, which no name tells apart."""
    from torch.profiler import record_function

    import hybrid.branches.mamba2
    import hybrid.branches.rwkv6
    from hybrid.bench.regions import RWKV, SSD

    def mark(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def marked_call(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return marked_call

    places = ((hybrid.branches.rwkv6, "wkv6", RWKV), (hybrid.branches.mamba2, "ssd", SSD))
    before = [getattr(module, name) for module, name, _ in places]
    for (module, name, region), function in zip(places, before, strict=True):
        setattr(module, name, mark(region, function))
    try:
        yield
    finally:
        for (module, name, _), function in zip(places, before, strict=True):
            setattr(module, name, function)


if __name__ == "__main__":
    main()
