"""The training loop: one run, or several that differ by seeds and learning rates, from configuration to record."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from dataclasses import replace
from types import FrameType
from typing import Any

import torch

from hybrid.device import clock_of, gpu_id, serving_kernels
from hybrid.memory import give_back_memory, process_peak, reset_process_peak
from hybrid.monitor import GpuMonitor
from hybrid.records import environment
from hybrid.training import checkpoint
from hybrid.training.evaluation import evaluate
from hybrid.training.member import Member
from hybrid.training.step import build_step


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; its newest checkpoint is at the step where it did."""


class Stop:
    """Turns Ctrl-C and SIGTERM into a flag that is read between two steps; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Stop:
        self.before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever started it handles signals
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains its members. ``train`` returns their outcomes; each one's folder then holds log, metrics and weights.

    Takes configurations whose device, precision and kernels are settled (``hybrid.device.resolve_device``) and that
    differ in nothing but seeds and learning rates.

    Everything that changes from step to step is in the models, the optimiser, PyTorch's generators and the members'
    ``state``; all of it is checkpointed, and batches depend on the step alone, so a resumed run repeats an undisturbed
    one bit by bit on the CPU.
    """

    def __init__(self, *members: Member) -> None:
        self.members = members
        self.cfg, self.corpus = members[0].cfg, members[0].corpus
        torch.set_num_threads(self.cfg.trainer.cpu_threads)
        self.device = members[0].device
        self.asked_to_stop = False
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        options = {key: getattr(self.cfg.trainer, key) for key in ("dtype", "compile", "cuda_graph", "cpu_threads")}
        options["members"] = len(members)
        self.environment = environment(name, serving_kernels(self.cfg)) | options
        self.step = build_step([m.cfg for m in members], [m.model for m in members], self.corpus)
        torch.manual_seed(self.cfg.seed_init)  # dropout

    @property
    def running(self) -> list[tuple[int, Member]]:
        """The members that have not ended, with their places."""
        return [(k, member) for k, member in enumerate(self.members) if member.status is None]

    def train(self) -> list[dict[str, Any]]:
        """Run to the end, or until every member has ended before it; resumes from the newest checkpoints.

        Raises ``Interrupted`` after Ctrl-C or SIGTERM, with checkpoints written, and ``DamagedCheckpoint``.
        """
        with contextlib.ExitStack() as self.open:
            for member in self.members:
                self.open.callback(member.close)
            return self._train()

    def _train(self) -> list[dict[str, Any]]:
        trainer = self.cfg.trainer
        start, resumed = self._resume()
        for member in self.members:
            member.begin(start, resumed)
        monitor: GpuMonitor | None = None
        if self.device.type == "cuda":
            samples = [member.folder.path / "gpu.jsonl" for member in self.members]
            monitor = self.open.enter_context(GpuMonitor(samples, gpu_id(self.device), resumed=resumed))
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_process_peak()
            self.open.callback(give_back_memory)
        ended_at = [start] * len(self.members)
        with Stop() as stop:
            if not resumed:
                for member in self.members:
                    member.introduce(self.environment)
                    member.validate(0)
                for k, member in self.running:
                    self.step.scale_lr(k, member.state["lr_scale"])
            clock, clock_step = time.monotonic(), start
            for step in range(start + 1, trainer.max_steps + 1):
                if not self.running:  # stopped before the first step
                    break
                self._update(step)
                last, asked = step == trainer.max_steps, stop.asked
                log, due = step % trainer.log_every == 0 or last, step % trainer.eval_every == 0 or last
                save = (step % trainer.checkpoint_every == 0 and not last) or asked
                if log or due or save:
                    losses = self.step.losses()  # waits for the device
                    now = time.monotonic()
                    for k, member in self.running:
                        member.timed(step - clock_step, now - clock, first=clock_step == start)
                        member.took(step, losses[k])
                        ended_at[k] = step
                        if log or member.status is not None:
                            memory = self._memory()
                            member.log(step, losses[k][-1], self.step.norms_by_part(k), memory)
                    for k, member in self.running:
                        if due or member.wants_to_stop is not None:
                            member.validate(step, member.last_speed or 0.0)
                        self.step.scale_lr(k, member.state["lr_scale"])
                    if save:
                        for k, member in self.running:
                            member.save(step, self.step.optimizer_state(k))
                    if not self.running:
                        break
                    if asked and not last:
                        raise Interrupted(f"stopped after step {step}; the same command goes on from there")
                    clock, clock_step = time.monotonic(), step
        self.asked_to_stop = stop.asked
        for _, member in self.running:
            member.end("completed", None)
            checkpoint.save_weights(member.model, member.folder.checkpoints / "final.safetensors")
        if monitor is not None:
            self.environment["gpu"] = monitor.summary()
        memory = self._memory()
        return [m.outcome(at, memory, self.environment) for m, at in zip(self.members, ended_at, strict=True)]

    def _resume(self) -> tuple[int, bool]:
        """The step after which to go on, and whether that comes from checkpoints."""
        found = []
        for k, member in enumerate(self.members):
            load_optimizer = functools.partial(self.step.load_optimizer_state, k)
            saved = checkpoint.load_newest(member.folder.checkpoints, member.model, load_optimizer)
            if saved is not None:
                member.restore(saved[1])
                self.step.scale_lr(k, member.state["lr_scale"])
            found.append(None if saved is None else saved[0])
        if len(set(found)) > 1:
            raise ValueError(f"runs at different steps cannot go on together: {found}")
        return found[0] or 0, found[0] is not None

    def estimate(self, steps: int) -> float:
        """Seconds for the whole run, measured on ``steps`` updates after a first and on one batch of validation."""

        clock = clock_of(self.device)
        self._update(1)
        begun = clock()
        for step in range(2, steps + 2):
            self._update(step)
        trained = (clock() - begun) / steps
        rows = self.cfg.trainer.eval_batch_size
        some = replace(self.corpus, val=self.corpus.val[: rows * self.cfg.data.seq_len + 1])
        begun = clock()
        evaluate(self.members[0].model, some, rows, self.device, getattr(torch, self.cfg.trainer.dtype))
        validated = (clock() - begun) * len(self.corpus.val) / len(some.val)
        max_steps, every = self.cfg.trainer.max_steps, self.cfg.trainer.eval_every
        return trained * max_steps + validated * (1 + math.ceil(max_steps / every))

    def _update(self, step: int) -> None:
        """The update with number ``step``, from 1."""
        self.step.run(step)

    def _memory(self) -> int:
        """Peak memory of the process in bytes: allocated on the device on CUDA, of the whole process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_peak()
