"""Starting a sweep's jobs through any launcher, watching them, and saying how to go on after Ctrl-C."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from rich.console import Console

from hybrid.records import RunBusy, describe_run
from hybrid.run import OUTCOME, PlannedRun
from sweeps import launchers
from sweeps.live import LiveView
from sweeps.registry import forget_namesakes, make_known


def launch(
    launcher: Launcher,
    batch: Sequence[Sequence[str]],
    home: Path,
    *,
    total: int,
    style: str,
    done: Callable[[], str],
    restarts: int = 0,
) -> list[JobReturn]:
    """Run one job per list of overrides; what each returned, in order.

    ``home`` is the sweep's folder, ``total`` how many runs the jobs will make, ``style`` is ``display.progress``, and
    ``done`` says in words what is there ("3 of 14 runs are done"). A job whose process is killed is started again at
    most ``restarts`` times (by the launchers of ``sweeps.launchers`` that start processes themselves). Ctrl-C and
    SIGTERM end all jobs, print how to go on, and raise ``KeyboardInterrupt``.
    """
    if not batch:
        return []
    console = Console(highlight=False)
    try:
        if not isinstance(launcher, launchers.ParallelLauncher):
            with sigterm_as_ctrl_c():
                return list(launcher.launch(batch, initial_job_idx=0))
        launcher.home, launcher.restarts = home, restarts
        with LiveView(home, total, style, console):
            return launcher.launch(batch, initial_job_idx=0)
    except KeyboardInterrupt:
        command = shlex.join(["python", *sys.orig_argv[1:]])
        console.print(f"{done()}; to go on: {command}", soft_wrap=True, markup=False)
        raise


def at_once(launcher: Launcher, batch: Sequence[Sequence[str]]) -> int:
    """How many such jobs, of as many as one likes, the launcher runs at the same time."""
    return launcher.at_most(batch) if isinstance(launcher, launchers.ParallelLauncher) else 1


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM between two runs, where no training loop takes it, ends the sweep as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever started it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def record_death(run: PlannedRun, overrides: list[str], error: BaseException) -> None:
    """The record of a run that could not write one, because its process was killed whenever it was tried."""
    with contextlib.suppress(RunBusy), run.folder.lock():
        if run.status is None:
            outcome = dict.fromkeys(OUTCOME) | {"status": "failed", "stop_reason": str(error)}
            run.folder.note(f"failed: {error}")
            run.folder.write_summary(describe_run(run.cfg, run.corpus, run.run_id, run.variant, overrides) | outcome)


def register() -> None:
    """Make our launchers known to Hydra under the names that ``conf/hydra/launcher`` gives them."""
    for name in ("JoblibLauncher", "SlurmLauncher", "LocalLauncher", "RayLauncher"):
        make_known(getattr(launchers, name))
    forget_namesakes()
