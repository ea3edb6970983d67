"""Ctrl-C and SIGTERM in the process that starts others: it asks them to stop, through a file that all of them watch."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is entered, the first Ctrl-C or SIGTERM sets ``asked`` and makes the file; Ctrl-C again sets ``kill``.

    A file reaches jobs on other machines, those that are still starting, and those that have not started yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.asked = self.kill = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.kill = self.kill or number == signal.SIGINT
            return
        self.asked = True
        self.file.touch()
        print(
            "stopping: every run finishes its step and writes a checkpoint (Ctrl-C again: at once, without)",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> StopRequest:
        self.before = {}
        with contextlib.suppress(ValueError):  # not the main thread: whoever started it handles signals
            self.before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Noticed:
    """While it is entered, ``asked`` says whether Ctrl-C came, besides what was done about it before.

    The ``KeyboardInterrupt`` that it raises can be lost: libraries that catch everything swallow it.
    """

    def __init__(self) -> None:
        self.asked = False

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.before(number, frame)

    def __enter__(self) -> Noticed:
        self.before = signal.getsignal(signal.SIGINT)
        self.installed = False
        if callable(self.before):
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, self._notice)
                self.installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, self.before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let both signals wait. A process that is started inside inherits that, and none ends it before it is ready."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
