"""Peak memory of this process, per run even where several runs share the process."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path


def reset_process_peak() -> None:
    """Let the peak start from what is in use now. Only Linux can; elsewhere the peak is that of the process's life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def process_peak() -> int:
    """Largest resident memory in bytes since the last reset."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
