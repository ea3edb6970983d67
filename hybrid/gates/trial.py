"""All gates on a configuration before it is run: a short training on a small batch, in memory.

The first 1,000 steps at 128 sequences of 1,024 tokens take hours on a CPU. So the batch is cut to 8 sequences of 64
tokens, as many steps are taken as the time allows, and warm-up and schedule are scaled with them: the learning rate
goes through the same values as in the real first 1,000 steps, only faster. What was done stands beside the verdicts.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybrid import build_model
from hybrid.config import ConfigError
from hybrid.data import Corpus
from hybrid.device import clock_of, resolve_device, serving_kernels
from hybrid.gates.watching import UNREAD, GateWatcher
from hybrid.model import copied
from hybrid.probe import Probe
from hybrid.records import environment
from hybrid.run import check_machine
from hybrid.schema import Config
from hybrid.training.step import PlainStep

ROWS, LENGTH = 8, 64
LEAST_STEPS = 12  # whatever the time: a few, so that a loss that is not finite shows
LEAST_TO_JUDGE = 50  # steps before gates G3 and G4: the first gradients are large and badly balanced in any model
LATE = 1.1  # the training ends at this multiple of its time, should the machine have become slower


@dataclass
class Trial:
    """``watcher`` holds the verdicts; steps ``done`` of ``of``, and ``remarks`` on what was made smaller."""

    watcher: GateWatcher
    done: int
    of: int
    remarks: list[str]

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        return self.watcher.state["records"]


def try_gates(cfg: Config, corpus: Corpus, seconds: float, begun: float) -> Trial:
    """Run the gates on a checked configuration in ``seconds`` since ``begun`` (of ``time.monotonic``).

    A device or kernel that is missing fails G0, and a forward pass that raises fails G1; the gates after it are then
    not reached.
    """
    cfg = copy.deepcopy(cfg)
    of = min(cfg.gates.G3.steps, cfg.trainer.max_steps)
    trial = Trial(GateWatcher(cfg), 0, of, [])
    cfg.trainer.cpu_threads = cfg.trainer.cpu_threads or 1  # a second one gains little at this size, and may lose
    try:
        check_machine(cfg)
        resolve_device(cfg)
    except ConfigError as error:
        trial.watcher.see_failed("G0", str(error))
        return trial
    torch.set_num_threads(cfg.trainer.cpu_threads)
    device = torch.device(cfg.trainer.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    trial.watcher.begin(environment(name, serving_kernels(cfg)))
    torch.manual_seed(cfg.seed_init)
    model = build_model(cfg).to(device)
    probe = Probe(model, corpus, device, getattr(torch, cfg.trainer.dtype))
    clock = clock_of(device)
    before = clock()
    try:
        row = probe(0)
    except (RuntimeError, ValueError) as error:
        trial.watcher.see_failed("G1", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return trial
    trial.watcher.see(row)
    last_probe = clock() - before
    train(trial, cfg, corpus, model, begun + seconds - last_probe)
    trial.watcher.see(probe(trial.done))
    return trial


def train(trial: Trial, cfg: Config, corpus: Corpus, model: torch.nn.Module, until: float) -> None:
    """Take as many of the steps as fit before ``until``, and show each to the gates."""
    wanted = f"{cfg.trainer.batch_size * cfg.trainer.grad_accum} x {cfg.data.seq_len}"
    cfg.data.seq_len = min(LENGTH, cfg.data.seq_len)
    cfg.trainer.batch_size, cfg.trainer.grad_accum = min(ROWS, cfg.trainer.batch_size), 1
    cfg.trainer.compile = cfg.trainer.cuda_graph = False
    cfg.trainer.log_every = 1
    corpus = replace(corpus, seq_len=cfg.data.seq_len)
    each = seconds_a_step(cfg, corpus, copied(model))
    steps = max(LEAST_STEPS, min(trial.of, int((until - time.monotonic()) / each)))
    steps = min(steps, trial.of)
    scaled(cfg, steps / trial.of)
    step = PlainStep(cfg, model, corpus)
    begun = time.monotonic()
    unseen = []
    for number in range(1, steps + 1):
        step.run(number)
        loss = step.losses()[0][-1]
        unseen.append({"kind": "train", "step": number, "loss": loss, **step.norms_by_part(0)})
        if number >= LEAST_TO_JUDGE or number == trial.of or not math.isfinite(loss):
            for row in unseen:
                trial.watcher.see(row)
            unseen.clear()
        trial.done = number
        late = time.monotonic() > begun + LATE * max(until - begun, 0.0)
        if late and number >= LEAST_STEPS:
            break
    taken = f"{cfg.trainer.batch_size} x {cfg.data.seq_len}"
    smaller = "" if taken == wanted else f" instead of {wanted}"
    trial.remarks.append(f"trained for {trial.done:,} of {trial.of:,} steps at batch {taken}{smaller}")
    if unseen:
        trial.remarks.append(f"too few steps for G3 and G4, which are first read at step {LEAST_TO_JUDGE}")
    elif trial.done < cfg.gates.G4.every and trial.records["G4"]["reading"] == UNREAD:
        trial.remarks.append(f"too few steps for G4, which is first read at step {cfg.gates.G4.every}")
    if trial.done < trial.of:
        warmup = cfg.schedule.warmup_steps
        trial.remarks.append(
            f"the schedule is scaled with the steps (warm-up: {warmup:,}); --seconds gives more of them"
        )


def seconds_a_step(cfg: Config, corpus: Corpus, model: torch.nn.Module) -> float:
    """Measured on two steps after a first, of a model that is thrown away."""
    step, clock = PlainStep(cfg, model, corpus), clock_of(torch.device(cfg.trainer.device))
    step.run(1)
    begun = clock()
    for number in (2, 3):
        step.run(number)
        step.losses()
        step.norms_by_part(0)
    return (clock() - begun) / 2


def scaled(cfg: Config, share: float) -> None:
    """Have the first ``share`` of the gates' steps go through what all of them would."""
    cfg.schedule.warmup_steps = round(cfg.schedule.warmup_steps * share)
    cfg.trainer.max_steps = max(1, round(cfg.trainer.max_steps * share))
    # RWKV-6's output starts at zero, and so do most of its gradients: the first steps say nothing of the balance.
    cfg.gates.G4.every = min(cfg.gates.G4.every, max(LEAST_TO_JUDGE, round(cfg.gates.G4.every * share)))
