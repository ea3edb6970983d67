"""What is done beside the imports: nothing of it may change or break what follows."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from hybrid import start

BESIDE = """
import gc, sys, threading
from hybrid import start
from hybrid.start import import_torch, import_training, keep_imports
keep_imports()
assert "torch" not in sys.modules
import_torch()
frozen = gc.get_freeze_count()
assert frozen > 10_000 and gc.isenabled()
contexts = []
start.make_context = contexts.append
import_training("cuda")  # a device that need not be there
assert gc.get_freeze_count() > 1.5 * frozen and gc.isenabled()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(60)
assert contexts == ["cuda"]
frozen = gc.get_freeze_count()
import_training("cuda")
assert gc.get_freeze_count() == frozen  # only what the first time has imported is never looked through again
import hybrid.training.loop
from torch._inductor import codecache
from torch._inductor.runtime.triton_compat import triton_key
assert triton_key.cache_info().currsize == 1
codecache.build_code_hash = None
assert codecache.torch_key()
"""


def test_imports_and_what_is_done_beside_them() -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", BESIDE], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "Traceback" not in answer.stderr


def test_nothing_is_kept_for_a_process_with_other_work() -> None:
    program = "import gc; from hybrid.start import import_torch; import_torch('cpu'); assert not gc.get_freeze_count()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("device", "kept"), [("cpu", 2), ("cuda:1", 0)])
def test_memory_is_kept_wherever_a_cpu_trains(device: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where everything had been imported before."""
    calls: list[str] = []
    monkeypatch.setattr(start, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(start, "importlib", SimpleNamespace(import_module=lambda _: SimpleNamespace()))
    monkeypatch.setattr(start, "meanwhile", lambda *_: None)
    monkeypatch.setattr(start, "keep_memory", lambda: calls.append("kept"))
    start.import_training(device)
    start.sys.modules[start.TRAINING] = None
    start.import_training(device)
    assert len(calls) == kept


@pytest.mark.parametrize(("device", "spoken_to"), [("auto", True), ("cuda:1", True), ("cpu", False)])
def test_the_driver_is_spoken_to_where_it_may_be_needed(
    device: str, spoken_to: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[object] = []
    monkeypatch.setattr(start, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(start, "importlib", SimpleNamespace(import_module=lambda _: None))
    monkeypatch.setattr(start, "meanwhile", lambda *given: tasks.extend(given))
    start.import_torch(device)
    assert tasks == [start.reach_driver] * spoken_to


def test_what_is_done_in_threads_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, nobody would see an error."""
    calls: list[object] = []
    driver = SimpleNamespace(cuInit=calls.append)
    monkeypatch.setattr(start, "ctypes", SimpleNamespace(CDLL=lambda name: calls.append(name) or driver))
    start.reach_driver()
    assert calls == ["libcuda.so.1", 0]
    start.make_context("cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        start.make_context("cuda:99")


def test_nobody_waits_for_the_tasks_but_the_end_of_the_process() -> None:
    running, end, threads = threading.Event(), threading.Event(), []
    start.meanwhile(lambda: threads.append(threading.current_thread()), running.set, lambda: end.wait(10))
    assert running.wait(10)
    assert threads[0] is not threading.current_thread() and not threads[0].daemon
    end.set()


def test_a_task_that_fails_stops_no_other() -> None:
    done = threading.Event()
    start.meanwhile(lambda: 1 / 0, done.set)
    assert done.wait(10)


@pytest.mark.parametrize("collecting", [True, False])
def test_a_failed_import_leaves_the_collector_as_it_was(collecting: bool) -> None:
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError), start.importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
