"""Starting quickly: what else a first step waits for is done while Python imports. This module imports no torch.

Most of the seconds before a first step go by with imports, which hold Python's lock. What needs none is done in
threads meanwhile: CUDA's driver is spoken to for the first time, the device gets its context, and Triton and Inductor
hash their own code (libtriton alone has hundreds of megabytes), by which they name what they keep on disk. And nobody
looks for garbage among modules. What fails in a thread is left to fail where it is needed.
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

TRAINING = "hybrid.training.loop"


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


@contextmanager
def imports_to_stay() -> Iterator[None]:
    """For programs: the same, and what there is by then is never looked through again."""
    with collector_paused():
        yield
        gc.freeze()


def import_torch() -> None:
    """Import torch, and speak to CUDA's driver meanwhile, where there is one (the first time takes 0.2 to 0.3 s)."""
    if "torch" in sys.modules:
        return
    meanwhile(lambda: ctypes.CDLL("libcuda.so.1").cuInit(0))
    with imports_to_stay():
        importlib.import_module("torch")


def import_training(device: str) -> None:
    """Import what trains on ``device``. On a GPU its context is made meanwhile, and what names compiled code."""
    if TRAINING in sys.modules:
        return
    import_torch()
    with imports_to_stay():
        cuda = device.startswith("cuda")
        if cuda:
            with contextlib.suppress(ImportError):
                names = importlib.import_module("torch._inductor.runtime.triton_compat")
                meanwhile(lambda: make_context(device), lambda: names.triton_key())
        importlib.import_module(TRAINING)
        if cuda:
            with contextlib.suppress(ImportError):
                names_of_graphs = importlib.import_module("torch._inductor.codecache")
                meanwhile(lambda: names_of_graphs.torch_key())


def make_context(device: str) -> None:
    import torch

    torch.empty(1, device=device)


def meanwhile(*tasks: Callable[[], object]) -> None:
    """Do the tasks in a thread, in this order."""

    def work() -> None:
        for task in tasks:
            with contextlib.suppress(Exception):
                task()

    threading.Thread(target=work, daemon=True).start()
