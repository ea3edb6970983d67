"""One run inside a training: its model, its record, and what is remembered of it from step to step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from hybrid import build_model
from hybrid.data import Corpus
from hybrid.model import HybridLM
from hybrid.probe import Probe
from hybrid.progress import RunProgress
from hybrid.records import RunFolder
from hybrid.schema import Config
from hybrid.training import checkpoint
from hybrid.training.board import Board
from hybrid.training.evaluation import Evaluation, Evaluator
from hybrid.training.optimizer import group_of, peak_lr
from hybrid.training.schedule import lr_factor
from hybrid.training.watching import RATIO_WINDOW, RED_FLAG, Action, Watcher, build_watchers

# Called after every evaluation but the first and the last with its step and loss in nats per token; a text stops the
# run and is its reason.
Judge = Callable[[int, float], str | None]


class Member:
    """A run that is trained, alone or together with others that differ by seeds or learning rates.

    What changes from step to step and is not in model, optimiser or PyTorch's generators is in ``state``, which is
    checkpointed. ``status`` is None until the run has ended.
    """

    def __init__(
        self, cfg: Config, corpus: Corpus, folder: RunFolder, progress: RunProgress, judge: Judge | None = None
    ) -> None:
        self.cfg, self.corpus, self.folder, self.progress, self.judge = cfg, corpus, folder, progress, judge
        self.device = torch.device(cfg.trainer.device)
        self.model: HybridLM = build_model(cfg).to(self.device)
        self.groups = tuple(dict.fromkeys(group_of(name) for name, _ in self.model.named_parameters()))
        self.evaluate = Evaluator(
            self.model, corpus, cfg.trainer.eval_batch_size, self.device, getattr(torch, cfg.trainer.dtype),
            graph=cfg.trainer.cuda_graph,
        )  # fmt: skip
        self.watchers: list[Watcher] = build_watchers(cfg)
        wanted = any(watcher.needs_probe for watcher in self.watchers)
        self.probe = Probe(self.model, corpus, self.device, self.evaluate.dtype) if wanted else None
        self.wants_to_stop: str | None = None  # a watcher's reason; acted upon after an evaluation
        self.board: Board | None = None
        self.status: str | None = None
        self.reason: str | None = None
        self.last_speed: float | None = None
        self.begun = time.monotonic()
        # What a checkpoint carries besides weights, optimiser and generators. Losses in nats per token.
        self.state: dict[str, Any] = {
            "best_val_loss": math.inf,
            "best_step": 0,
            "final_val_loss": math.nan,
            "final_train_loss": math.nan,
            "gate_mean": None,
            "val_bits_per_byte": math.nan,
            "loss_sum": 0.0,  # of the steps since the last evaluation
            "loss_steps": 0,
            "ratios": [],
            "timed_seconds": 0.0,  # of the intervals between two logs but the first, which warms up and compiles
            "timed_steps": 0,
            "wall_seconds": 0.0,
            "lr_scale": 1.0,  # of the schedule's learning rate, lowered by watchers
            "watchers": {watcher.name: watcher.state for watcher in self.watchers},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint carries."""
        self.state = state
        for watcher in self.watchers:
            watcher.state = state["watchers"][watcher.name]

    @property
    def tokens_per_step(self) -> int:
        trainer = self.cfg.trainer
        return trainer.batch_size * trainer.grad_accum * self.cfg.data.seq_len

    def begin(self, start: int, resumed: bool) -> None:
        """Drop what was logged after step ``start`` and start the clock."""
        if resumed:
            self.progress.message(f"resumes after step {start}")
        self.folder.forget_after(start if resumed else -1)
        self.progress.begin(start)
        if self.cfg.trainer.tensorboard:
            self.board = Board(self.folder.path / "tensorboard", start + 1 if resumed else 0)
        self.begun = time.monotonic() - self.state["wall_seconds"]

    def introduce(self, environment: dict[str, Any]) -> None:
        """Tell the watchers of a run at its start what it runs on."""
        for watcher in self.watchers:
            self.act(watcher, watcher.begin(environment))

    def act(self, watcher: Watcher, action: Action | None) -> None:
        """Say what a watcher found, and do what it asks for; a run stops at the next evaluation, which is made."""
        for line in watcher.news():
            self.progress.message(line, alarm=line.startswith(RED_FLAG))
        if action is None:
            return
        if action.lr_factor is None:
            self.wants_to_stop = self.wants_to_stop or action.reason
        else:
            self.state["lr_scale"] *= action.lr_factor
            self.progress.message(f"learning rate x{action.lr_factor:g}: {action.reason}")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def wall(self) -> float:
        return time.monotonic() - self.begun

    def timed(self, steps: int, seconds: float, first: bool) -> None:
        """``steps`` took ``seconds``; the ``first`` ones of a process say nothing about the speed."""
        self.last_speed = steps * self.tokens_per_step / max(seconds, 1e-9)
        if not first:
            self.state["timed_seconds"] += seconds
            self.state["timed_steps"] += steps

    def took(self, step: int, losses: list[float]) -> None:
        """The losses of the steps up to ``step`` that were not yet read; ends the run if one is not finite."""
        self.state["loss_sum"] += sum(losses)
        self.state["loss_steps"] += len(losses)
        bad = [i for i, value in enumerate(losses) if not math.isfinite(value)]
        if bad:
            self.end("diverged", f"training loss not finite at step {step - len(losses) + 1 + bad[0]}")
        else:
            self.progress.step(step, losses[-1], self.last_speed or 0.0)

    def end(self, status: str, reason: str | None) -> None:
        self.status, self.reason = status, reason

    def validate(self, step: int, speed: float = 0.0) -> Evaluation:
        """Evaluate, record, keep the best weights, and let the judge have a look; may end the run."""
        state = self.state
        evaluation = self.evaluate()
        train_loss = state["loss_sum"] / state["loss_steps"] if state["loss_steps"] else None
        state["loss_sum"], state["loss_steps"] = 0.0, 0
        state["final_val_loss"], state["val_bits_per_byte"] = evaluation.loss, evaluation.bits_per_byte
        state["final_train_loss"] = train_loss
        row = {
            "kind": "eval",
            "step": step,
            "tokens": step * self.tokens_per_step,
            "train_loss": train_loss,
            "val_loss": evaluation.loss,
            "val_bits_per_byte": evaluation.bits_per_byte,
            "wall_seconds": self.wall(),
        }
        state["gate_mean"] = evaluation.gate_mean
        if evaluation.gate_mean is not None:
            row["gate_mean"] = evaluation.gate_mean
        self.record(row)
        if self.probe is not None:
            self.record(self.probe(step))
        if evaluation.loss < state["best_val_loss"]:
            state["best_val_loss"], state["best_step"] = evaluation.loss, step
            checkpoint.save_weights(self.model, self.folder.checkpoints / "best.safetensors")
        self.progress.evaluated(step, row, state["ratios"][-1] if state["ratios"] else None, speed)
        if not math.isfinite(evaluation.loss) and step > 0:
            self.end("diverged", f"validation loss not finite at step {step}")
        elif self.judge is not None and 0 < step < self.cfg.trainer.max_steps:
            reason = self.judge(step, evaluation.loss)
            if reason is not None:
                self.end("stopped", reason)
        if self.status is None and self.wants_to_stop is not None and step < self.cfg.trainer.max_steps:
            self.end("stopped", self.wants_to_stop)
        return evaluation

    def log(self, step: int, loss: float, parts: dict[str, float], memory: int) -> None:
        """Record a training step; ``parts`` are gradient norms."""
        if "grad_ratio" in parts:
            self.state["ratios"] = [*deque(self.state["ratios"], RATIO_WINDOW - 1), parts["grad_ratio"]]
        factor = lr_factor(step - 1, self.cfg) * self.state["lr_scale"]
        self.record(
            {
                "kind": "train",
                "step": step,
                "tokens": step * self.tokens_per_step,
                "loss": loss,
                "lr": self.cfg.optim.lr * factor,
                **{f"lr_{group}": peak_lr(self.cfg.optim, group) * factor for group in self.groups},
                **parts,
                "tokens_per_second": self.last_speed,
                "memory_bytes": memory,
                "wall_seconds": self.wall(),
            }
        )

    def record(self, row: dict[str, Any]) -> None:
        self.folder.append(row)
        if self.board is not None and row["kind"] != "probe":
            self.board.add(row)
        for watcher in self.watchers:
            self.act(watcher, watcher.see(row))

    def save(self, step: int, optimizer: dict[str, Any]) -> None:
        self.state["wall_seconds"] = self.wall()
        checkpoint.save_step(self.folder.checkpoints, step, self.model, optimizer, self.state)

    def speed(self) -> float | None:
        """Training tokens per second without the first interval, unless there is no other."""
        if self.state["timed_steps"]:
            return self.state["timed_steps"] * self.tokens_per_step / self.state["timed_seconds"]
        return self.last_speed

    def outcome(self, steps: int, memory: int, environment: dict[str, Any]) -> dict[str, Any]:
        """The part of a summary that the training decides."""
        state = self.state
        ratios = state["ratios"]
        return {
            "status": self.status,
            "stop_reason": self.reason,
            "steps": steps,
            "tokens": steps * self.tokens_per_step,
            **{key: state[key] for key in ("best_val_loss", "best_step", "final_val_loss", "final_train_loss")},
            "val_bits_per_byte": state["val_bits_per_byte"],
            "grad_ratio": sum(ratios) / len(ratios) if ratios else None,
            "gate_mean": state["gate_mean"],
            "gates": {},
            "tokens_per_second": self.speed(),
            "peak_memory_bytes": memory,
            "wall_seconds": self.wall(),
            "environment": environment,
            **{key: value for watcher in self.watchers for key, value in watcher.summary().items()},
        }
