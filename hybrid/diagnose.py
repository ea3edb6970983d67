"""What the branches of trained models do: ``python -m hybrid.diagnose RUN [RUN ...]``.

Switches branches off, maps gates, follows the influence of single tokens and reads the decays; writes
``diagnosis.json`` into each run's folder. A folder of a sweep stands for every finished run in it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console

from hybrid.arguments import Parser
from hybrid.config import ConfigError
from hybrid.data import DataError
from hybrid.diagnostics.loading import CHECKPOINTS, find_runs, open_run


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m hybrid.diagnose", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a sweep's")
    parser.add_argument("--checkpoint", default="best", choices=CHECKPOINTS, help="which weights (default best)")
    parser.add_argument(
        "--tokens", type=int, help="validation tokens, in windows spread over the split (default all; 8,192 on a CPU)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--force", action="store_true", help="diagnose again what has been diagnosed")
    given = parser.parse_args(arguments)
    if given.tokens is not None and given.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {given.tokens}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", given.device):
        parser.error(f"--device must be auto, cpu, cuda or cuda:N, got '{given.device}'")
    try:
        failed = diagnose_all(given)
    except ConfigError as error:  # of the device
        complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failed else 0)


def diagnose_all(given: argparse.Namespace) -> bool:
    """Diagnose one run after the other, whatever becomes of the others. Returns whether any failed."""
    failed = False
    folders: dict[Path, Path] = {}  # by their real place, so that each is diagnosed once
    for path in given.runs:
        try:
            found, left_out = find_runs(path)
        except ConfigError as error:
            complain(str(error))
            failed = True
            continue
        for words in left_out:
            print(words, flush=True)
        folders |= {folder.resolve(): folder for folder in found}
    if not folders:
        if failed:  # no run to diagnose in any of the arguments
            sys.exit(2)
        return False
    import torch

    from hybrid.diagnostics.document import CPU_TOKENS, Options, diagnose, read_diagnosis, settle_machine
    from hybrid.diagnostics.show import show

    options = Options(given.checkpoint, given.tokens, given.device)
    machine = settle_machine(given.device)
    if given.tokens is None and machine.device == "cpu":
        print(f"on a CPU about {CPU_TOKENS:,} validation tokens are used; --tokens sets another number", flush=True)
    console = Console()
    for folder in folders.values():
        try:
            run = open_run(folder, given.checkpoint)
            diagnosis = None if given.force else read_diagnosis(run, options)
            if diagnosis is not None:
                print(f"already diagnosed: {folder}", flush=True)
            else:
                diagnosis = diagnose(run, options, machine)
        except (ConfigError, DataError) as error:
            complain(f"{folder.name}: {error}")
            failed = True
        except torch.OutOfMemoryError:
            complain(f"{folder.name}: not enough memory on {machine.device}; use --device cpu")
            failed = True
        except OSError as error:
            complain(f"{folder.name}: {error}")
            failed = True
        else:
            show(console, diagnosis, str(folder))
    return failed


def complain(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
