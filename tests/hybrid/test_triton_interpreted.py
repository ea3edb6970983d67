"""Runs tests of Triton kernels in processes of their own: Triton's interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# All but the first hold whichever form serves, here the kernels.
@pytest.mark.parametrize(
    "cases",
    ["triton_cases.py", "test_stacked_adamw.py"]
    + [f"test_{name}.py" for name in ("conv", "ddlerp", "mamba2_between", "norms", "recurrence_operators")],
)
def test_kernels_in_the_interpreter(cases: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--no-header", "-p", "no:cacheprovider", str(HERE / cases)]
    answer = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    print(answer.stdout)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
    # Nothing was left out either: pytest counts every case as passed.
    last = answer.stdout.splitlines()[-1]
    assert re.match(r"\d+ passed(, \d+ warnings?)? in", last), last
