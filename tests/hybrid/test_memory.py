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
        blocks = [torch.ones(size * 2**18) for size in range(2, 25)]  # 300 MiB, none of more than 32
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_memory()
new_pages(4)  # until what lies between them has been filled
print(new_pages(12))
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
    assert int(printed(STEPS)) < 10_000  # of 900,000 where nothing is kept


@glibc
def test_settings_of_the_environment_are_kept() -> None:
    assert int(printed(STEPS, MALLOC_MMAP_THRESHOLD_="131072")) > 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
@glibc
def test_a_small_run_after_a_large_one_has_its_own_peak() -> None:
    printed(PEAKS)
