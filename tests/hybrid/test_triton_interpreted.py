"""Runs ``triton_cases.py`` in a process of its own, because Triton's interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("triton_cases.py")


def test_fused_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header", "-p", "no:cacheprovider", str(CASES)]
    answer = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    # Nothing was left out either: pytest counts every case as passed.
    assert re.search(r"\d+ passed in", answer.stdout.splitlines()[-1]), answer.stdout.splitlines()[-1]
