"""One optimiser step: parameter by parameter, or for a stack of models and as a CUDA graph.

Steps of models this small are hundreds of kernels of a few microseconds; starting them one by one from Python takes
ten times as long as running them. ``StackStep`` records a whole step once (batch, forward, backward, clipping,
learning rate, update) and replays it with one call. ``PlainStep`` is what it is held against. Both do the same
arithmetic on the same batches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.data import Corpus
from hybrid.model import HybridLM, autocast
from hybrid.schema import Config
from hybrid.training.optimizer import GradientNorms, build_optimizer, part_norms, peak_lr, set_lr
from hybrid.training.schedule import lr_factor
from hybrid.training.stack import Stack
from hybrid.training.stacked_adamw import StackedAdamW, update_backend

WARM_UP = 3  # steps before recording: kernels are compiled and libraries make their workspaces
TABLE = 256  # steps whose batches and learning rates are sent to the device at once


class PlainStep:
    """Runs the update with number ``step`` (from 1) on the batch of that number. One model."""

    def __init__(self, cfg: Config, model: HybridLM, corpus: Corpus) -> None:
        self.cfg, self.model, self.corpus = cfg, model, corpus
        self.device = torch.device(cfg.trainer.device)
        self.dtype = getattr(torch, cfg.trainer.dtype)
        self.optimizer = build_optimizer(model, cfg.optim, fused=self.device.type == "cuda")
        self.gradients = GradientNorms(model)
        self.forward = torch.compile(model) if cfg.trainer.compile else model
        self.pending: list[Tensor] = []
        self.lr_scale = 1.0

    def scale_lr(self, member: int, scale: float) -> None:
        """From the next step on, multiply the schedule's learning rate by ``scale``."""
        self.lr_scale = scale

    def run(self, step: int) -> None:
        set_lr(self.optimizer, lr_factor(step - 1, self.cfg) * self.lr_scale)
        trainer = self.cfg.trainer
        # One draw per step, then cut: how a step is split into micro-batches does not change what it sees.
        batch = self.corpus.train_batch(self.cfg.seed_data, step - 1, trainer.batch_size * trainer.grad_accum)
        inputs, targets = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in batch)
        self.pending.append(self.update(inputs, targets))

    def update(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One optimiser step; the mean loss of its micro-batches, on the device."""
        trainer = self.cfg.trainer
        self.model.train()
        total = torch.zeros((), device=self.device)
        for tokens, labels in zip(inputs.split(trainer.batch_size), targets.split(trainer.batch_size), strict=True):
            with autocast(self.device, self.dtype):
                logits = self.forward(tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            (loss / trainer.grad_accum).backward()
            total += loss.detach() / trainer.grad_accum
        self.norms = self.gradients.clip(self.cfg.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def losses(self) -> list[list[float]]:
        """Of every member, the losses since the last call, in order; waits for the device."""
        losses = torch.stack(self.pending).tolist() if self.pending else []
        self.pending.clear()
        return [losses]

    def norms_by_part(self, member: int) -> dict[str, float]:
        """Gradient norms of the last step before clipping, as the log shows them."""
        return self.gradients.by_part(self.norms)

    def optimizer_state(self, member: int) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer_state(self, member: int, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class StackStep:
    """The same for a ``Stack``: all its members at once, each on its own batches, on CUDA as one graph.

    The tokens of the training split are on the device; batches are gathered there.
    """

    def __init__(self, cfgs: list[Config], models: list[HybridLM], corpus: Corpus) -> None:
        self.cfgs, self.cfg, self.corpus = cfgs, cfgs[0], corpus
        trainer = self.cfg.trainer
        self.device = torch.device(trainer.device)
        self.dtype = getattr(torch, trainer.dtype)
        self.stack = Stack(models, self.dtype, trainer.compile)
        self.optimizer = StackedAdamW(self.stack.leaves, self.cfg.optim, update_backend(self.cfg))
        self.rows = trainer.batch_size * trainer.grad_accum
        members = len(models)
        self.tokens = torch.from_numpy(np.asarray(corpus.train, dtype=np.int32)).to(self.device)
        self.window = torch.arange(self.cfg.data.seq_len + 1, device=self.device)
        self.starts = torch.zeros(TABLE, members, self.rows, dtype=torch.int64, device=self.device)
        self.peaks = [[peak_lr(cfg.optim, group["name"]) for cfg in cfgs] for group in self.optimizer.param_groups]
        self.scales = [1.0] * members
        self.lrs = torch.zeros(TABLE, len(self.peaks), members, device=self.device)
        self.share = torch.full((members,), 1 / trainer.grad_accum, device=self.device)  # of a micro-batch in the loss
        self.recorded = torch.zeros(TABLE, members, device=self.device)  # losses
        self.row = torch.zeros(1, dtype=torch.int64, device=self.device)  # of these tables, for the next step
        self.first: int | None = None  # step of the tables' first row
        self.stale = False  # the tables hold other learning rates than those to come
        self.last = 0
        self.read = 0  # rows of ``recorded`` that have been read ...
        self.kept: list[list[float]] = []  # ... and what they held, until somebody asks
        self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(self.device) if trainer.cuda_graph else None

    def scale_lr(self, member: int, scale: float) -> None:
        """From the next step on, multiply the schedule's learning rate of a member by ``scale``."""
        if scale != self.scales[member]:
            self.scales[member], self.stale = scale, True

    def run(self, step: int) -> None:
        if self.first is None or self.stale or step >= self.first + TABLE:
            self._fill(step)
        if self.stream is None:
            self._whole()
        elif self.done < WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self._whole()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        else:
            if self.graph is None:
                self._record()
            self.graph.replay()
        self.done += 1
        self.last = step

    def _record(self) -> None:
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._whole()

    def _whole(self) -> None:
        starts = self.starts.index_select(0, self.row).squeeze(0)
        windows = self.tokens[starts.unsqueeze(-1) + self.window].long()  # [members, rows, T + 1]
        self.lr_now = self.lrs.index_select(0, self.row).squeeze(0)  # [groups, members]
        losses = self.update(windows[..., :-1].contiguous(), windows[..., 1:].contiguous())
        self.recorded.index_copy_(0, self.row, losses.unsqueeze(0))
        self.row += 1

    def update(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One optimiser step on [members, rows, T]; the mean loss of every member's micro-batches."""
        trainer, members = self.cfg.trainer, self.stack.members
        for model in self.stack.models:
            model.train()
        self.optimizer.zero_grad(set_to_none=True)  # here, so that the log can read them after the step
        total = torch.zeros(members, device=self.device)
        size = trainer.batch_size
        for tokens, labels in zip(inputs.split(size, dim=1), targets.split(size, dim=1), strict=True):
            with autocast(self.device, self.dtype):
                logits = self.stack.forward(tokens)
            losses = F.cross_entropy(logits.float().flatten(0, 2), labels.flatten(), reduction="none")
            losses = losses.view(members, -1).mean(dim=1)
            # In this thread: autograd's own has another cuBLAS handle, with workspaces (32 MiB a stream on an H100).
            with torch.autograd.set_multithreading_enabled(False):
                losses.backward(self.share)
            total.add_(losses.detach(), alpha=1 / trainer.grad_accum)
        self.optimizer.step(self.lr_now)
        return total

    def _fill(self, step: int) -> None:
        """Send the batches and learning rates of the steps from ``step`` on."""
        self._read()  # before the losses are overwritten
        numbers = range(step - 1, step - 1 + TABLE)
        starts = [[self.corpus.train_starts(cfg.seed_data, index, self.rows) for cfg in self.cfgs] for index in numbers]
        self.starts.copy_(torch.from_numpy(np.array(starts)))
        factors = [
            [lr_factor(index, cfg) * scale for cfg, scale in zip(self.cfgs, self.scales, strict=True)]
            for index in numbers
        ]
        self.lrs.copy_(torch.from_numpy(np.array(factors)[:, None] * np.array(self.peaks)))
        self.row.zero_()
        self.first, self.read, self.stale = step, 0, False

    def _read(self) -> None:
        if self.first is not None:
            upto = self.last - self.first + 1
            self.kept += self.recorded[self.read : upto].tolist()
            self.read = max(self.read, upto)

    def losses(self) -> list[list[float]]:
        """Of every member, the losses since the last call, in order; waits for the device."""
        self._read()
        found = [list(member) for member in zip(*self.kept, strict=True)] or [[] for _ in self.cfgs]
        self.kept = []
        return found

    def norms_by_part(self, member: int) -> dict[str, float]:
        """Gradient norms of the last step before clipping, as the log shows them."""
        return part_norms(self.stack.names, self.stack.norms(member))

    def optimizer_state(self, member: int) -> dict[str, Any]:
        """As a stack of this member alone would have it."""
        whole = self.optimizer.state_dict()
        state = {
            # A copy: what is saved of a view is all that it looks into.
            i: {key: value[member : member + 1].clone() if value.ndim else value for key, value in leaf.items()}
            for i, leaf in whole["state"].items()
        }
        groups = [
            {**group, "lr": peaks[member], "peak_lr": peaks[member]}
            for group, peaks in zip(whole["param_groups"], self.peaks, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, member: int, state: dict[str, Any]) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            mine = self.optimizer.state[group["params"][0]]
            for key, value in state["state"][i].items():
                if value.ndim:
                    mine[key][member].copy_(value[0])
                else:
                    mine[key].copy_(value)


def build_step(cfgs: list[Config], models: list[HybridLM], corpus: Corpus) -> PlainStep | StackStep:
    """The step for one run or for several that differ by seeds or learning rates."""
    if len(models) == 1 and not cfgs[0].trainer.cuda_graph:
        return PlainStep(cfgs[0], models[0], corpus)
    return StackStep(cfgs, models, corpus)
