"""What a process keeps of the memory that its training frees, and its peak."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")

STEPS = """
import resource, torch
from hybrid.memory import keep_memory
def new_pages(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        # Of sizes that older versions of glibc keep too; the last is the last to be freed.
        blocks = [torch.ones(size * 2**18) for size in (3, 20, 8, 24, 13, 17, 5, 22)]
        while blocks:
            blocks.pop(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
anew = new_pages(3)
keep_memory()
new_pages(5)  # until what lies between them has been filled
print(new_pages(3) / anew)
"""
PEAKS = """
import torch
from hybrid.memory import give_back_memory, keep_memory, process_peak, reset_process_peak
keep_memory()
def peak(megabytes):
    reset_process_peak()
    blocks = [torch.ones(2**18) for _ in range(megabytes)]
    return process_peak() / 2**20
large, small = peak(400), peak(10)
assert small < large - 300, (large, small)
reset_process_peak()
after = process_peak() / 2**20
peak(300)
give_back_memory()
with open("/proc/self/statm") as file:
    resident = int(file.read().split()[1]) * 4096 / 2**20
assert resident < after + 50, (resident, after)
"""


def printed(program: str, **environment: str) -> str:
    run = [sys.executable, "-c", program]
    return subprocess.run(run, env=os.environ | environment, check=True, capture_output=True, text=True).stdout


@glibc
def test_memory_that_a_step_frees_serves_the_next() -> None:
    assert float(printed(STEPS)) < 0.05


@glibc
def test_settings_of_the_environment_are_kept() -> None:
    assert float(printed(STEPS, MALLOC_MMAP_THRESHOLD_="131072")) > 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
@glibc
def test_a_small_run_after_a_large_one_has_its_own_peak() -> None:
    printed(PEAKS)
