"""Sweeps through the parallel launchers that are stopped: checkpoints, no process left, and on they go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import alive, descendants, metrics_steps, until
from tests.runs import (
    ROOT,
    Answer,
    Setting,
    cli,
    finish,
    results,
    rows,
    same_weights,
    start,
    wait_for,
    weights,
)  # fmt: skip
from tests.runs import (
    command as start_command,
)
from tests.sweeps.launched import JOBLIB, TWO, records

pytestmark = pytest.mark.usefixtures("one_thread")


def long_enough(small: Setting) -> list[str]:
    """Overrides of runs that last until they are stopped in the middle, without a checkpoint before."""
    own = [line for line in small.with_() if not line.startswith(("trainer.max", "trainer.eval", "trainer.check"))]
    return [*own, "trainer.max_steps=200", "trainer.eval_every=100", "trainer.checkpoint_every=200"]


def stop_in_the_middle(small: Setting, number: signal.Signals) -> Path:
    """The signal goes to the parent alone, as ``kill`` sends it; the sweep's folder."""
    command = [*long_enough(small), "sweep.name=two"]
    process, root = start([*command, "seed_init=0,1,2,3", *JOBLIB], "-m"), small.out / "two"
    wait_for(lambda: len(metrics_steps(root)) == 2, process)
    below = descendants(process.pid)
    process.send_signal(number)
    stopped_right(finish(process), root, below)
    assert not records(root) and len(metrics_steps(root)) == 2  # two were in the middle, two have not begun
    return root


def test_a_stopped_sweep_leaves_checkpoints_and_no_process(small: Setting) -> None:
    stop_in_the_middle(small, signal.SIGINT)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_as_if_undisturbed(small: Setting) -> None:
    root, command = stop_in_the_middle(small, signal.SIGTERM), long_enough(small)
    assert cli([*command, "sweep.name=two", "seed_init=1"], "-m").code == 0
    ((name, record),) = records(root).items()
    assert "resumes after step" in (root / name / "log.txt").read_text()
    folder, summary = Setting(tuple(command), small.out).run("seed_init=1")
    assert results(record) == results(summary) and rows(root / name) == rows(folder)
    assert same_weights(weights(root / name), weights(folder))


def stopped_right(answer: Answer, root: Path, below: list[int]) -> None:
    assert answer.code == 130, answer
    assert answer.err.splitlines()[0].startswith("stopping: ") and len(answer.err.splitlines()) == 2, answer.err
    said = answer.out.splitlines()[-1]
    assert re.match(rf"{len(records(root))} of 4 runs are done; to go on: python -m hybrid.train -m ", said)
    assert len(below) >= 2
    until(lambda: not alive(below), 10)
    for name in metrics_steps(root).keys() - records(root).keys():
        assert list((root / name / "checkpoints").glob("step-*")), name
        assert "Traceback" not in (root / name / "log.txt").read_text()
    assert not list(root.glob("launcher/*/stop"))


@pytest.mark.slow
def test_ctrl_c_before_the_first_step(small: Setting) -> None:
    """As a terminal sends it, to all processes of the group, while the children are still starting."""
    process = subprocess.Popen(
        start_command(small.with_(*TWO, *JOBLIB), "-m"), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(descendants(process.pid)) >= 2, process)
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    stopped_right(finish(process), small.out / "two", below)
    assert not records(small.out / "two") and not list((small.out / "two").rglob("process-*.txt"))


@pytest.mark.slow
def test_a_second_ctrl_c_kills(small: Setting) -> None:
    """Steps that take longer than anyone waits."""
    own = [line for line in small.with_() if not line.startswith(("trainer.batch_size", "trainer.grad_accum"))]
    process = start([*own, *TWO, *JOBLIB, "trainer.batch_size=4", "trainer.grad_accum=100000"], "-m")
    root = small.out / "two"
    wait_for(lambda: len(list(root.glob("*/metrics.jsonl"))) == 2, process)
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None and len(alive(below)) >= 2  # they are waited for
    process.send_signal(signal.SIGINT)
    answer = finish(process)
    assert answer.code == 130 and "0 of 4 runs are done; to go on: " in answer.out
    until(lambda: not alive(below), 10)


@pytest.mark.slow
def test_children_end_with_a_checkpoint_when_their_parent_is_killed(small: Setting) -> None:
    command = small.with_(*TWO, *JOBLIB)
    own = [line for line in command if not line.startswith(("trainer.max_steps", "trainer.check"))]
    process, root = (
        start([*own, "trainer.max_steps=100000", "trainer.checkpoint_every=100000"], "-m"),
        small.out / "two",
    )
    wait_for(lambda: len(metrics_steps(root)) == 2, process)
    below = descendants(process.pid)
    process.kill()
    process.wait()
    until(lambda: not alive(below), 30)
    for name in metrics_steps(root):
        assert list((root / name / "checkpoints").glob("step-*")), name
    finish(process)


@pytest.mark.slow
def test_basic_says_how_to_go_on(small: Setting) -> None:
    process = start(small.with_(*TWO, "trainer.checkpoint_every=1000"), "-m")
    root = small.out / "two"
    wait_for(lambda: bool(metrics_steps(root)), process)
    process.send_signal(signal.SIGTERM)
    answer = finish(process)
    assert answer.code == 130 and "the same command goes on" in answer.err
    said = answer.out.splitlines()[-1]
    assert re.match(r"\d of 4 runs are done; to go on: python -m hybrid.train -m ", said)
    assert f"out={small.out}" in said
