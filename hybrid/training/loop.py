"""The training loop: one run from its configuration to its record."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

from hybrid import build_model
from hybrid.data import Corpus
from hybrid.memory import process_peak, reset_process_peak
from hybrid.model import HybridLM, autocast
from hybrid.progress import RunProgress
from hybrid.records import RunFolder, environment
from hybrid.schema import Config
from hybrid.training import checkpoint
from hybrid.training.board import Board
from hybrid.training.evaluation import Evaluation, evaluate
from hybrid.training.optimizer import GradientNorms, build_optimizer, set_lr
from hybrid.training.schedule import lr_factor

RATIO_WINDOW = 10  # logged steps behind the summary's gradient ratio


# Called after every evaluation but the first and the last with its step and loss in nats per token; a text stops the
# run and is its reason.
Judge = Callable[[int, float], str | None]


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
    """Trains one model. ``train`` returns the summary's outcome; the folder then holds log, metrics and weights.

    Takes a configuration whose device, precision and kernels are settled (``hybrid.device.resolve_device``).

    Everything that changes from step to step is in the model, the optimiser, PyTorch's generators and ``state``; all
    of it is checkpointed, and batches depend on the step alone, so a resumed run repeats an undisturbed one bit by
    bit on the CPU.
    """

    def __init__(
        self, cfg: Config, corpus: Corpus, folder: RunFolder, progress: RunProgress, judge: Judge | None = None
    ) -> None:
        self.cfg, self.corpus, self.folder, self.progress, self.judge = cfg, corpus, folder, progress, judge
        torch.set_num_threads(cfg.trainer.cpu_threads)
        self.device = torch.device(cfg.trainer.device)
        self.dtype = getattr(torch, cfg.trainer.dtype)
        self.board: Board | None = None
        self.asked_to_stop = False
        self.last_speed: float | None = None
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        options = {key: getattr(cfg.trainer, key) for key in ("dtype", "compile", "cpu_threads")}
        self.environment = environment(name, asdict(cfg.kernels)) | options
        self.model: HybridLM = build_model(cfg).to(self.device)
        self.compiled = torch.compile(self.model) if cfg.trainer.compile else self.model
        self.optimizer = build_optimizer(self.model, cfg.optim, fused=self.device.type == "cuda")
        self.norms = GradientNorms(self.model)
        torch.manual_seed(cfg.seed_init)  # dropout
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
        }

    @property
    def tokens_per_step(self) -> int:
        trainer = self.cfg.trainer
        return trainer.batch_size * trainer.grad_accum * self.cfg.data.seq_len

    def train(self) -> dict[str, Any]:
        """Run to the end or to a non-finite loss; resumes from the newest checkpoint.

        Raises ``Interrupted`` after Ctrl-C or SIGTERM, with a checkpoint written, and ``DamagedCheckpoint``.
        """
        try:
            return self._train()
        finally:
            if self.board is not None:
                self.board.close()

    def _train(self) -> dict[str, Any]:
        cfg, trainer = self.cfg, self.cfg.trainer
        resumed = checkpoint.load_newest(self.folder.checkpoints, self.model, self.optimizer)
        start = 0
        if resumed is not None:
            start, self.state = resumed
            self.progress.message(f"resumes after step {start}")
        self.folder.forget_after(start if resumed is not None else -1)
        self.progress.begin(start)
        if trainer.tensorboard:
            self.board = Board(self.folder.path / "tensorboard", start + 1 if resumed is not None else 0)
        self._begun = time.monotonic() - self.state["wall_seconds"]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_process_peak()
        status, reason, step = "completed", None, start
        with Stop() as stop:
            if resumed is None:
                self._evaluate(0)
            pending: list[torch.Tensor] = []  # losses not yet read from the device
            clock, clock_step = time.monotonic(), start
            for step in range(start + 1, trainer.max_steps + 1):
                set_lr(self.optimizer, lr_factor(step - 1, cfg))
                loss, norms = self._update(step)
                pending.append(loss)
                last, asked = step == trainer.max_steps, stop.asked
                log, due = step % trainer.log_every == 0 or last, step % trainer.eval_every == 0 or last
                save = (step % trainer.checkpoint_every == 0 and not last) or asked
                if log or due or save:
                    losses = torch.stack(pending).tolist()  # waits for the device
                    pending.clear()
                    now = time.monotonic()
                    speed = (step - clock_step) * self.tokens_per_step / max(now - clock, 1e-9)
                    if clock_step != start:
                        self.state["timed_seconds"] += now - clock
                        self.state["timed_steps"] += step - clock_step
                    self.last_speed = speed
                    self.state["loss_sum"] += sum(losses)
                    self.state["loss_steps"] += len(losses)
                    finite = all(math.isfinite(value) for value in losses)
                    if log or not finite:
                        self._log(step, losses[-1], norms, speed)
                    if not finite:
                        first = next(i for i, value in enumerate(losses) if not math.isfinite(value))
                        status = "diverged"
                        reason = f"training loss not finite at step {step - len(losses) + 1 + first}"
                        break
                    self.progress.step(step, losses[-1], speed)
                    if due:
                        evaluation = self._evaluate(step, speed)
                        if not math.isfinite(evaluation.loss):
                            status, reason = "diverged", f"validation loss not finite at step {step}"
                            break
                        reason = self.judge(step, evaluation.loss) if self.judge is not None and not last else None
                        if reason is not None:
                            status = "stopped"
                            break
                    if save:
                        self._save(step)
                    if asked and not last:
                        raise Interrupted(f"stopped after step {step}; the same command goes on from there")
                    clock, clock_step = time.monotonic(), step
        self.asked_to_stop = stop.asked
        if status == "completed":
            checkpoint.save_weights(self.model, self.folder.checkpoints / "final.safetensors")
        return self.outcome(status, reason, step)

    def estimate(self, steps: int) -> float:
        """Seconds for the whole run, measured on ``steps`` updates after a first and on one batch of validation."""

        def clock() -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return time.monotonic()

        self._update(1)
        begun = clock()
        for step in range(2, steps + 2):
            self._update(step)
        trained = (clock() - begun) / steps
        rows = self.cfg.trainer.eval_batch_size
        some = replace(self.corpus, val=self.corpus.val[: rows * self.cfg.data.seq_len + 1])
        begun = clock()
        evaluate(self.model, some, rows, self.device, self.dtype)
        validated = (clock() - begun) * len(self.corpus.val) / len(some.val)
        max_steps, every = self.cfg.trainer.max_steps, self.cfg.trainer.eval_every
        return trained * max_steps + validated * (1 + math.ceil(max_steps / every))

    def _update(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step; the mean loss of its micro-batches and the gradient norms, both on the device."""
        trainer = self.cfg.trainer
        self.model.train()
        total = torch.zeros((), device=self.device)
        # One draw per step, then cut: how a step is split into micro-batches does not change what it sees.
        batch = self.corpus.train_batch(self.cfg.seed_data, step - 1, trainer.batch_size * trainer.grad_accum)
        inputs, targets = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in batch)
        for tokens, labels in zip(inputs.split(trainer.batch_size), targets.split(trainer.batch_size), strict=True):
            with autocast(self.device, self.dtype):
                logits = self.compiled(tokens)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            (loss / trainer.grad_accum).backward()
            total += loss.detach() / trainer.grad_accum
        norms = self.norms.clip(self.cfg.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norms

    def _evaluate(self, step: int, speed: float = 0.0) -> Evaluation:
        state = self.state
        evaluation = evaluate(self.model, self.corpus, self.cfg.trainer.eval_batch_size, self.device, self.dtype)
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
            "wall_seconds": self._wall(),
        }
        state["gate_mean"] = evaluation.gate_mean
        if evaluation.gate_mean is not None:
            row["gate_mean"] = evaluation.gate_mean
        self._record(row)
        if evaluation.loss < state["best_val_loss"]:
            state["best_val_loss"], state["best_step"] = evaluation.loss, step
            checkpoint.save_weights(self.model, self.folder.checkpoints / "best.safetensors")
        self.progress.evaluated(step, row, state["ratios"][-1] if state["ratios"] else None, speed)
        return evaluation

    def _log(self, step: int, loss: float, norms: torch.Tensor, speed: float) -> None:
        parts = self.norms.by_part(norms)
        if "grad_ratio" in parts:
            self.state["ratios"] = [*deque(self.state["ratios"], RATIO_WINDOW - 1), parts["grad_ratio"]]
        lr = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self._record(
            {
                "kind": "train",
                "step": step,
                "tokens": step * self.tokens_per_step,
                "loss": loss,
                "lr": self.cfg.optim.lr * lr_factor(step - 1, self.cfg),
                **lr,
                **parts,
                "tokens_per_second": speed,
                "memory_bytes": self._memory(),
                "wall_seconds": self._wall(),
            }
        )

    def _record(self, row: dict[str, Any]) -> None:
        self.folder.append(row)
        if self.board is not None:
            self.board.add(row)

    def _save(self, step: int) -> None:
        self.state["wall_seconds"] = self._wall()
        checkpoint.save_step(self.folder.checkpoints, step, self.model, self.optimizer, self.state)

    def _wall(self) -> float:
        return time.monotonic() - self._begun

    def _speed(self) -> float | None:
        """Training tokens per second without the first interval, unless there is no other."""
        if self.state["timed_steps"]:
            return self.state["timed_steps"] * self.tokens_per_step / self.state["timed_seconds"]
        return self.last_speed

    def _memory(self) -> int:
        """Peak memory of the run in bytes: allocated on the device on CUDA, of the whole process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return process_peak()

    def outcome(self, status: str, reason: str | None, steps: int) -> dict[str, Any]:
        """The part of a summary that the training decides."""
        state = self.state
        ratios = state["ratios"]
        return {
            "status": status,
            "stop_reason": reason,
            "steps": steps,
            "tokens": steps * self.tokens_per_step,
            **{key: state[key] for key in ("best_val_loss", "best_step", "final_val_loss", "final_train_loss")},
            "val_bits_per_byte": state["val_bits_per_byte"],
            "grad_ratio": sum(ratios) / len(ratios) if ratios else None,
            "gate_mean": state["gate_mean"],
            "gates": {},  # verdicts of the validation gates, none yet
            "tokens_per_second": self._speed(),
            "peak_memory_bytes": self._memory(),
            "wall_seconds": self._wall(),
            "environment": self.environment,
        }
