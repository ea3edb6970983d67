"""Checkpoints: weights as safetensors, and everything else that resuming bit by bit needs.

    checkpoints/best.safetensors      weights at the lowest validation loss
    checkpoints/final.safetensors     weights at the end
    checkpoints/step-00001000/        weights and training state to resume from; only the newest is kept

A step folder is written under another name and renamed, so a folder with the right name is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights in one go: a reader sees the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, partial)
    os.replace(partial, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Raises ``RuntimeError`` where the weights are another model's."""
    model.load_state_dict(load_file(path))


def save_step(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Keep everything that a resumed run needs after update number ``step``, and drop older step folders."""
    target = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(model, partial / "model.safetensors")
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state_all()
    torch.save({"step": step, "optimizer": optimizer.state_dict(), "rng": rng, "state": state}, partial / "training.pt")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for other in folder.glob("step-*"):
        if other != target:
            shutil.rmtree(other)


def load_newest(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
    """Restore the newest step folder: ``(step, state)``, or None where there is none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    load_weights(model, found[-1] / "model.safetensors")
    saved = torch.load(found[-1] / "training.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"]["cpu"])
    if "cuda" in saved["rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    return saved["step"], saved["state"]


def remove_steps(folder: Path) -> None:
    """A finished run keeps its weights only."""
    for step in (*folder.glob("step-*"), *folder.glob("partial-*")):
        shutil.rmtree(step)
