"""Try the gates on a configuration: ``python -m hybrid.gates key=value ...``. Torch is imported when the keys hold."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from hybrid.arguments import Parser, amount, describe, fail, override

USAGE = """\
Takes the keys of hybrid.train; trains a few steps on a small batch, in memory: nothing is written to outputs/.

exit status: 0 where every gate passes, warns or does not apply, 1 where one fails, 2 for a bad configuration
"""


def main(arguments: list[str] | None = None) -> None:
    begun = time.monotonic()
    parser = Parser(
        prog="python -m hybrid.gates", description="Run the gates G0 to G4 on a configuration.", epilog=USAGE,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=amount, default=90.0, help="time for everything (90)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("overrides", nargs="*", type=override, metavar="key=value", help="as for hybrid.train")
    options = parser.parse_args(arguments)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from hybrid.config import ConfigError
    from hybrid.data import DataError
    from hybrid.train import explain

    try:
        failed = check(options, begun)
    except (ConfigError, DataError) as error:
        fail(str(error), 2)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error), 2)
    except OSError as error:
        fail(describe(error), 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(int(failed))


def check(options: argparse.Namespace, begun: float) -> bool:
    """Print what the gates say; whether one of them failed."""
    from hybrid.bench.configure import configuration
    from hybrid.config import ConfigError
    from hybrid.records import finite, variant_name
    from hybrid.run import check_data
    from hybrid.train import check_choices

    check_choices(options.overrides)
    cfg = configuration(options.overrides)
    if cfg.sweep.arms or cfg.sweep.grid or cfg.sweep.seeds:
        raise ConfigError(f"sweep={cfg.sweep.name} consists of several runs; give the gates the keys of one")
    if not cfg.gates.enabled:
        raise ConfigError("gates.enabled=false leaves nothing to check")
    corpus = check_data(cfg)
    from rich.console import Console

    from hybrid.gates.table import show
    from hybrid.gates.trial import try_gates

    trial = try_gates(cfg, corpus, options.seconds, begun)
    took = time.monotonic() - begun
    trial.remarks.append(f"{took:.0f} s in all")
    name = variant_name(cfg, options.overrides)
    if options.json:
        print(json.dumps(finite(as_json(trial, name, took)), indent=1))
    else:
        console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=170)
        show(console, trial, f"{name}: {corpus.name}, {corpus.vocab_size:,} symbols")
    return any(record["verdict"] == "fail" for record in trial.records.values())


def as_json(trial: Any, name: str, took: float) -> dict[str, Any]:
    return {
        "variant": name,
        "steps": trial.done,
        "of_steps": trial.of,
        "seconds": took,
        "remarks": trial.remarks,
        "gates": {
            gate.name: {"test": gate.test, "thresholds": gate.thresholds()} | trial.records[gate.name]
            for gate in trial.watcher.gates
        },
    }


if __name__ == "__main__":
    main()
