"""Models and trainers for the tests of training."""

from __future__ import annotations

import torch
import torch.nn as nn

from hybrid import build_model
from hybrid.progress import RunProgress
from hybrid.training.loop import Trainer
from hybrid.training.member import Member
from tests.runs import Setting

CPU = torch.device("cpu")


def model_of(small: Setting, *overrides: str) -> nn.Module:
    return build_model(small.config("model.vocab_size=30", *overrides))


def trainer_of(small: Setting, *overrides: str) -> Trainer:
    """A trainer in a folder of its own, before its first step."""
    run = small.plan("display.progress=off", *overrides)
    run.folder.create(run.cfg, run.corpus)
    progress = RunProgress("test", run.cfg.trainer.max_steps, run.cfg.display, run.folder.note)
    return Trainer(Member(run.cfg, run.corpus, run.folder, progress))


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Move every parameter, because many start at zero and hide what they do."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
