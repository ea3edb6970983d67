"""Starting quickly: what else a first step waits for is done while Python imports. This module imports no torch.

Most of the seconds before a first step go by with imports, which hold Python's lock. What needs none is done in
threads meanwhile: CUDA's driver is spoken to for the first time, the device gets its context, and Triton and Inductor
hash their own code (libtriton alone has hundreds of megabytes), by which they name what they keep on disk. And nobody
looks for garbage among modules. What fails in a thread is left to fail where it is needed.

On a CPU it is not the first step that waits but every one, for the operating system's memory: see
``hybrid.memory.keep_memory``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hybrid.memory import keep_memory

TRAINING = "hybrid.training.loop"
_kept = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """Thousands of modules are made, none of them garbage: looking for some is a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def keep_imports() -> None:
    """For programs: what there is after the imports below is never looked through again.

    In a process with other work it would keep that work's garbage.
    """
    global _kept
    _kept = True


@contextmanager
def importing() -> Iterator[None]:
    with collector_paused():
        yield
        if _kept:
            gc.freeze()


def import_torch(device: str = "auto") -> None:
    """Import torch. Meanwhile CUDA's driver is spoken to (the first time takes 0.2 to 0.3 s), but for ``cpu``."""
    if "torch" in sys.modules:
        return
    if device != "cpu":
        meanwhile(reach_driver)
    with importing():
        importlib.import_module("torch")


def import_training(device: str) -> None:
    """Import what trains on ``device``. On a GPU its context is made meanwhile, and what names compiled code.

    On a CPU the process keeps from now on what it frees, until a training ends.
    """
    if device == "cpu":
        keep_memory()
    if TRAINING in sys.modules:
        return
    import_torch(device)
    with importing():
        cuda = device.startswith("cuda")
        if cuda:
            with contextlib.suppress(ImportError):
                names = importlib.import_module("torch._inductor.runtime.triton_compat")
                meanwhile(lambda: make_context(device), lambda: names.triton_key())  # looked up there: it may be gone
        importlib.import_module(TRAINING)
        if cuda:
            with contextlib.suppress(ImportError):
                names_of_graphs = importlib.import_module("torch._inductor.codecache")
                meanwhile(lambda: names_of_graphs.torch_key())


def reach_driver() -> None:
    ctypes.CDLL("libcuda.so.1").cuInit(0)


def make_context(device: str) -> None:
    import torch

    torch.empty(1, device=device)


def meanwhile(*tasks: Callable[[], object]) -> None:
    """Do the tasks in a thread, in this order. A process waits for them before it ends: CUDA would abort it."""

    def work() -> None:
        for task in tasks:
            with contextlib.suppress(Exception):
                task()

    threading.Thread(target=work).start()
