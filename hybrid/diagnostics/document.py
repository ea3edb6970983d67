"""The diagnosis of one run as one JSON document, ``diagnosis.json`` in the run's folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid import build_model
from hybrid.config import ConfigError
from hybrid.device import resolve_device
from hybrid.diagnostics.gates import mean_gates, token_classes
from hybrid.diagnostics.loading import Run, Trained, load_run
from hybrid.diagnostics.memory import draw_changes, measure_half_lives, measure_influence
from hybrid.diagnostics.necessity import measure_necessity
from hybrid.diagnostics.observe import observe
from hybrid.diagnostics.substitutes import branch_names
from hybrid.diagnostics.updates import measure_updates
from hybrid.diagnostics.windows import Windows, bin_starts, validation_windows
from hybrid.files import write_text_atomically
from hybrid.records import code_version, environment, finite
from hybrid.schema import Config

SCHEMA = "groundthink.diagnosis/1"
FILE = "diagnosis.json"
CPU_TOKENS = 8192  # validation tokens on a CPU, unless told otherwise
SAMPLE_TOKENS = 4096  # for what hardly differs from token to token: decays, and gates before training
UPDATE_TOKENS = 2**20  # training tokens on a GPU for the size of updates
CHANGES = (16, 256)  # least and most tokens replaced to measure their influence


@dataclass(frozen=True)
class Options:
    """What a diagnosis was asked for. ``tokens`` None: all of them, on a CPU about ``CPU_TOKENS``."""

    checkpoint: str = "best"
    tokens: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Machine:
    device: str
    kernels: dict[str, str]

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"


def settle_machine(device: str) -> Machine:
    """The device that "auto" means, and the kernels that serve there. Raises ``ConfigError``."""
    cfg = Config()
    cfg.trainer.device = device
    try:
        resolve_device(cfg)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device=", "--device ")) from error
    return Machine(cfg.trainer.device, asdict(cfg.kernels))


@functools.cache
def diagnostics_version() -> str:
    """A hash of the sources of the diagnostics themselves, which ``code_version`` leaves out."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def key_of(run: Run, options: Options) -> dict[str, Any]:
    """What a diagnosis depends on: the run, its weights, what was asked for, the code."""
    return {
        "schema": SCHEMA,
        "run_id": run.summary["run_id"],
        "weights_sha256": run.weights_sha256,
        "options": asdict(options),
        "code": f"{code_version()}-{diagnostics_version()}",
    }


def read_diagnosis(run: Run, options: Options) -> dict[str, Any] | None:
    """The diagnosis in the run's folder, if it is of the same weights, options and code."""
    try:
        found = json.loads((run.folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    key = key_of(run, options)
    return found if isinstance(found, dict) and {name: found.get(name) for name in key} == key else None


def diagnose(run: Run, options: Options, machine: Machine) -> dict[str, Any]:
    """Measure everything and write it down. Raises ``ConfigError``, ``DataError`` or ``OSError``."""
    begun = time.monotonic()
    trained = load_run(run, machine.device)
    limit = options.tokens or (CPU_TOKENS if machine.device == "cpu" else None)
    windows = validation_windows(
        trained.corpus, max(2, trained.cfg.trainer.eval_batch_size), torch.device(machine.device)
    )
    windows = windows if limit is None else windows.spread(limit)
    document = {
        **key_of(run, options),
        **{name: run.summary[name] for name in ("variant", "seed_init", "seed_data")},
        "checkpoint": options.checkpoint,
        "step": run.step,
        "environment": environment(machine.name, machine.kernels)
        | {"trained_code_version": (run.summary.get("environment") or {}).get("code_version")},
        "dtype": "float32",
        **measure(trained, windows, limit or UPDATE_TOKENS),
        "wall_seconds": time.monotonic() - begun,
    }
    write_text_atomically(run.folder / FILE, json.dumps(finite(document), indent=1) + "\n")
    return finite(document)


def measure(trained: Trained, windows: Windows, update_tokens: int) -> dict[str, Any]:
    """Everything that is measured on the model."""
    cfg, corpus, model = trained.cfg, trained.corpus, trained.model
    seen = observe(model, windows, token_classes(corpus.tokenizer, model.embedding.num_embeddings))
    if not math.isfinite(seen.loss):
        raise ConfigError(f"the validation loss of these weights is not finite ({seen.loss})")
    sample = windows.spread(SAMPLE_TOKENS)
    gates = None
    if seen.gates:
        start = mean_gates(build_model(cfg).to(windows.device).eval(), sample)
        layers = [{"layer": i, "start": start[i], **maps.describe()} for i, maps in sorted(seen.gates.items())]
        gates = {"start": list(start.values()), "layers": layers, "positions": bin_starts(windows.length)}
    least, most = CHANGES
    changes = draw_changes(windows, max(least, min(most, windows.predicted // windows.length)))
    influence, error = measure_influence(model, changes, windows.batch_size, windows.device)
    updates, basis = measure_updates(model, cfg, corpus, windows.device, update_tokens)
    return {
        "tokens": windows.predicted,
        "windows": len(windows),
        "loss": seen.loss,
        "branches": branch_names(model),
        "necessity": measure_necessity(model, windows, seen.means),
        "gates": gates,
        "memory": {
            "influence": influence,
            "influence_standard_error": error,
            "changes": len(changes.tokens),
            "half_lives": measure_half_lives(model, sample),
            "loss_by_position": seen.describe_positions(),
        },
        "outputs": [statistics.describe() for statistics in seen.outputs],
        "updates": updates,
        "updates_basis": basis,
    }
