"""What a parallel launcher runs in its processes: one Hydra job at a time, which stops with a checkpoint when asked."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from sweeps.registry import forget_namesakes

POLL_SECONDS = 0.3  # how soon a job notices that it is to stop


class Stopped(RuntimeError):
    """The job was asked to stop and is unfinished; the message is one line."""


class ProcessDied(RuntimeError):
    """A job's process was killed, and again when the job ran on its own."""

    def __init__(self) -> None:
        super().__init__("its process was killed (out of memory?)")


@dataclass(frozen=True)
class Errand:
    """What all jobs of a launch share. ``stop`` is a file: once it exists, jobs stop and no other starts."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    stop: Path

    def __call__(self, index: int, overrides: Sequence[str], parent: int | None = None) -> JobReturn:
        """Compose and run one job; never raises. ``parent``: the process without which it has no purpose."""
        ret = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
        try:
            with attended(self.stop, parent):
                setup_globals()
                forget_namesakes()
                config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.id = config.hydra.job.num = index
                ret = run_job(
                    hydra_context=self.context,
                    task_function=self.task,
                    config=config,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
                ret.cfg = ret.hydra_cfg = None
        except KeyboardInterrupt as error:
            ret._return_value = Stopped(str(error) or "stopped before its first step")
        except BaseException as error:  # also sys.exit: it must not end a process that other jobs wait for
            ret._return_value = error
        return portable(ret)


def portable(ret: JobReturn) -> JobReturn:
    """The same, with what cannot travel between processes replaced by its text."""
    try:
        pickle.loads(pickle.dumps(ret))
    except Exception:
        ret._return_value = RuntimeError(f"{type(ret._return_value).__name__}: {ret._return_value}")
    return ret


_busy = False


@contextlib.contextmanager
def attended(stop: Path, parent: int | None) -> Iterator[None]:
    """Interrupt the job inside on SIGTERM or SIGINT, once ``stop`` exists, and when ``parent`` is gone.

    A training loop takes the signals itself while it trains (``hybrid.training.loop.Stop``) and writes a checkpoint;
    anywhere else they raise ``KeyboardInterrupt``.
    """
    global _busy

    inside = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if inside:
            raise KeyboardInterrupt

    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if stop.exists() or (parent is not None and os.getppid() != parent):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            ended.wait(POLL_SECONDS)

    if stop.exists():
        raise KeyboardInterrupt
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=watch, daemon=True)
    _busy = True
    try:
        watcher.start()
        yield
    finally:
        inside = False
        ended.set()
        watcher.join()
        _busy = False
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(parent: int, log: str) -> None:
    """Make this process one of a pool: in a group of its own, silent, and gone when its parent is.

    The terminal's Ctrl-C then reaches the parent alone, which asks every job to stop. SIGINT and SIGTERM were blocked
    by the parent until here.
    """
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    def leave() -> None:
        while os.getppid() == parent or _busy:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


class OnCluster:
    """An ``Errand`` as submitit wants it: before its time is up it checkpoints and goes back into the queue."""

    def __init__(self, errand: Errand) -> None:
        self.errand = errand

    def __call__(self, index: int, overrides: Sequence[str]) -> JobReturn:
        number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
        requeue = signal.getsignal(number)
        frames: list[FrameType | None] = []

        def stop_first(number: int, frame: FrameType | None) -> None:
            """Submitit would leave within its handler, in the middle of a step."""
            frames.append(frame)
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(number, stop_first)
        try:
            ret = self.errand(index, overrides)
        finally:
            signal.signal(number, requeue)
        if frames and isinstance(ret._return_value, Stopped) and callable(requeue):
            requeue(number, frames[0])  # ends the process
        return ret

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit puts into the queue: the same job, which resumes from its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *arguments)
