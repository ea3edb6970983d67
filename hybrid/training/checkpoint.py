"""Checkpoints: weights as safetensors, and everything else that resuming bit by bit needs.

    checkpoints/best.safetensors      weights at the lowest validation loss
    checkpoints/final.safetensors     weights at the end
    checkpoints/step-00001000/        weights and training state to resume from; only the newest is kept

A step folder is written under another name and renamed, so a folder with the right name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hybrid.records import remove_step


class DamagedCheckpoint(RuntimeError):
    """A checkpoint that cannot be read; it has been put aside."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights in one go: a reader sees the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, partial)
    except SafetensorError as error:  # all that can go wrong in writing is the disk
        raise OSError(f"cannot write {partial}: {error}") from error
    flush(partial)
    os.replace(partial, path)


def flush(path: Path) -> None:
    """Have a file on the disk before its name says that it is whole."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises ``RuntimeError`` where the weights are another model's."""
    model.load_state_dict(load_file(path))


def save_step(folder: Path, step: int, model: nn.Module, optimizer: dict[str, Any], state: dict[str, Any]) -> None:
    """Keep everything that a resumed run needs after update number ``step``, and drop older step folders."""
    target = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(model, partial / "model.safetensors")
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    torch.save({"step": step, "optimizer": optimizer, "rng": rng, "state": state}, partial / "training.pt")
    flush(partial / "training.pt")
    if target.exists():
        remove_step(target)
    partial.rename(target)
    for other in folder.glob("step-*"):
        if other != target:
            remove_step(other)


def load_newest(
    folder: Path, model: nn.Module, load_optimizer: Callable[[dict[str, Any]], None]
) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest step folder: ``(step, state)``, or None where there is none.

    A folder that cannot be read (a power cut, a bad disk) is put aside as ``damaged-*``, and ``DamagedCheckpoint``
    raised: model and optimiser may then be half restored, and have to be built again.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    newest = found[-1]
    try:
        saved = torch.load(newest / "training.pt", map_location="cpu", weights_only=True)
        load_weights(model, newest / "model.safetensors")
        load_optimizer(saved["optimizer"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if "cuda" in saved["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    except FileNotFoundError as error:
        raise put_aside(newest, error) from error
    except (OSError, MemoryError, torch.OutOfMemoryError):  # says nothing about the files
        raise
    except Exception as error:  # whatever a damaged file makes of the readers
        raise put_aside(newest, error) from error
    return saved["step"], saved["state"]


def put_aside(step: Path, error: Exception) -> DamagedCheckpoint:
    aside = step.with_name(f"damaged-{step.name}")
    shutil.rmtree(aside, ignore_errors=True)
    step.rename(aside)
    return DamagedCheckpoint(f"checkpoint {step.name} cannot be read ({type(error).__name__}); put aside")
