"""The memory of this process: its peak, per run even where several runs share the process, and what it keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> None:
    """Let what a training step frees stay with the process, for the next one; ``give_back_memory`` returns it.

    Else tensors of some megabytes are new memory in every step, which the operating system hands out page by page,
    zeroed: a tenth of a step of 1,000 tokens with 5M parameters, and more of one that is smaller. Does nothing where
    the C library is not glibc, or where the environment has settings for it.
    """
    own = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    if any(name in os.environ for name in own) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older versions refuse more than 32 MiB.
        if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
            mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, -1)


def give_back_memory() -> None:
    """Return to the operating system what is free in this process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_process_peak() -> None:
    """Let the peak start from what is in use now. Only Linux can; elsewhere the peak is that of the process's life."""
    give_back_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak() -> int:
    """Largest resident memory in bytes since the last reset."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
