"""Sweeps through the parallel launchers: the same records as one after another, whatever happens to a run."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hybrid.config import ConfigError
from sweeps import launchers
from sweeps.slots import make_slots, quota, visible_gpus
from tests.processes import holder, metrics_steps
from tests.runs import (
    ROOT,
    Setting,
    cli,
    finish,
    results,
    rows,
    same_weights,
    snapshot,
    start,
    wait_for,
    weights,
)  # fmt: skip
from tests.sweeps.launched import JOBLIB, TWO, records

pytestmark = pytest.mark.usefixtures("one_thread")


def same_runs(one: Path, other: Path) -> None:
    """Both folders hold the same runs with the same numbers and weights."""
    found, expected = records(one), records(other)
    assert {name: results(record) for name, record in found.items()} == {
        name: results(record) for name, record in expected.items()
    }
    for name in expected:
        assert rows(one / name) == rows(other / name)
        assert same_weights(weights(one / name), weights(other / name))


# ---- how a machine is divided


def test_without_gpus_the_cores_are_shared_out() -> None:
    slots = make_slots(3, 1, [], 8, 100, {})
    assert [slot["OMP_NUM_THREADS"] for slot in slots] == ["3", "3", "2"]
    assert all(slot["MKL_NUM_THREADS"] == slot["OMP_NUM_THREADS"] and len(slot) == 3 for slot in slots)
    assert len(make_slots(None, 1, [], 8, 100, {})) == 8 and len(make_slots(None, 1, [], 8, 5, {})) == 5
    assert [slot["OMP_NUM_THREADS"] for slot in make_slots(4, 1, [], 2, 100, {})] == ["1"] * 4


def test_a_thread_count_that_was_set_is_not_exceeded() -> None:
    assert make_slots(2, 1, [], 8, 2, {"OMP_NUM_THREADS": "1"})[0]["OMP_NUM_THREADS"] == "1"
    assert make_slots(2, 1, [], 8, 2, {"OMP_NUM_THREADS": "16"})[0]["OMP_NUM_THREADS"] == "4"


def test_every_process_has_a_gpu_of_its_own_or_its_share_of_one() -> None:
    assert [s["CUDA_VISIBLE_DEVICES"] for s in make_slots(None, 1, ["0", "1", "2"], 16, 9, {})] == ["0", "1", "2"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in make_slots(None, 2, ["3", "GPU-5f"], 16, 9, {})] == ["3", "GPU-5f"] * 2
    # fewer jobs than processes: spread over the GPUs, not packed onto the first
    assert [s["CUDA_VISIBLE_DEVICES"] for s in make_slots(None, 2, ["0", "1"], 16, 2, {})] == ["0", "1"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in make_slots(1, 1, ["0", "1"], 16, 9, {})] == ["0"]


def test_the_gpus_are_those_that_the_parent_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3,5,9"}) == ["3", "5"]  # CUDA ends the list where one is not there
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_gpus_are_given_out_only_where_runs_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "visible_gpus", lambda environment: ["0", "1"])
    launcher = launchers.JoblibLauncher()
    launcher.config = OmegaConf.create({"trainer": {"device": "auto"}})
    with_gpu = [["fusion=gain"], ["trainer.device=cpu"]]
    assert {slot["CUDA_VISIBLE_DEVICES"] for slot in launcher.slots(with_gpu)} == {"0", "1"}
    assert all("CUDA_VISIBLE_DEVICES" not in slot for slot in launcher.slots([["trainer.device=cpu"]] * 2))
    assert launcher.at_most(with_gpu[:1]) == 2
    with pytest.raises(ConfigError, match=r"trainer.device=cuda:1: .* gives out the GPUs"):
        launcher.slots([["trainer.device=cuda:1"]])


def test_the_quota_of_a_container(tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    for text, expected in (("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None)):
        file.write_text(text)
        assert quota(file) == expected
    assert quota(tmp_path / "none") is None


def test_each_process_sees_its_slot(tmp_path: Path) -> None:
    """Real processes that report their variables; every one keeps its GPU for all its jobs."""
    code = f"""
import os, sys
from pathlib import Path
from hydra.core.utils import JobReturn, JobStatus
from sweeps.pool import Pool
from hybrid.config import ConfigError
from sweeps import launchers
from sweeps.slots import make_slots

class Report:
    stop = Path({str(tmp_path)!r}) / "stop"
    def __call__(self, index, overrides, parent):
        import time; time.sleep(0.3)
        seen = (os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"])
        return JobReturn(status=JobStatus.COMPLETED, _return_value=seen)

if __name__ == "__main__":
    slots = make_slots(None, 2, ["4", "7"], 8, 8, {{}})
    for ret in Pool(slots, Report(), Path({str(tmp_path)!r})).run([[]] * 8, 0):
        print(*ret.return_value)
"""
    script = tmp_path / "report.py"
    script.write_text(code)
    done = subprocess.run(
        [os.sys.executable, script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    assert len(seen) == 8 and {threads for _, _, threads in seen} == {"2"}
    of_process = {pid: gpu for pid, gpu, _ in seen}
    assert len({(pid, gpu) for pid, gpu, _ in seen}) == len(of_process) == 4
    assert sorted(of_process.values()) == ["4", "4", "7", "7"]


# ---- the same results


@pytest.fixture(scope="module")
def basic(shared: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep TWO, one run after another."""
    out = tmp_path_factory.mktemp("basic")
    assert cli([*shared, f"out={out}", *TWO], "-m").code == 0
    return out / "two"


def test_a_launcher_of_another_package_does_not_lend_its_keys_to_ours(
    basic: Path, small: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As hydra-joblib-launcher does: a plugin that is found by itself and stores a schema named as our file."""
    plugin = tmp_path / "site" / "hydra_plugins" / "other_joblib_launcher"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    (plugin / "config.py").write_text(
        "from dataclasses import dataclass\n"
        "from hydra.core.config_store import ConfigStore\n\n"
        "@dataclass\nclass Conf:\n    _target_: str = 'nowhere'\n    n_jobs: int = -1\n\n"
        "ConfigStore.instance().store(group='hydra/launcher', name='joblib', node=Conf, provider='other')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{plugin.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    answer = finish(start(small.with_(*TWO, *JOBLIB), "-m"))
    assert (answer.code, answer.err) == (0, "")
    same_runs(small.out / "two", basic)


def test_joblib_gives_the_records_of_basic(basic: Path, small: Setting) -> None:
    answer = finish(start(small.with_(*TWO, *JOBLIB), "-m"))
    assert (answer.code, answer.err) == (0, "")
    same_runs(small.out / "two", basic)
    assert {path.name for path in small.out.iterdir()} == {"two"}
    assert {path.name for path in (small.out / "two").iterdir()} == {*records(basic), "sweep.json"}
    lines = answer.out.splitlines()
    assert lines[0] == f"two: 4 runs (2 arms x 2 seeds) -> {small.out}/two" and lines[-1] == "4 of 4 runs have a record"
    for arm in ("gain", "gated"):
        for seed in (0, 1):
            told = [line for line in lines if line.startswith(f"{arm} seed {seed}: ")]
            assert len(told) == 5 and told[0].endswith("begins")
            assert [int(re.search(r"step +(\d+)/12", line)[1]) for line in told[1:4]] == [0, 6, 12]
            assert re.search(r": completed, best val \d\.\d{4} at step \d+ \(\d of 4 ended", told[4])
    for record in records(small.out / "two").values():
        assert not any(line.startswith(("display", "hydra")) for line in record["overrides"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("submitit", ["hydra/launcher=submitit_local"]),
        ("ray", ["hydra/launcher=ray", "hydra.launcher.init.num_cpus=2"]),
    ],
)
def test_cluster_launchers_give_the_records_of_basic(
    basic: Path, small: Setting, package: str, options: list[str]
) -> None:
    pytest.importorskip(package)
    answer = finish(start(small.with_(*TWO, *options), "-m"))
    assert answer.code == 0, answer
    same_runs(small.out / "two", basic)
    assert {path.name for path in (small.out / "two").iterdir()} == {*records(basic), "sweep.json"}
    assert answer.out.count(": completed, best val") == 4


@pytest.mark.slow
def test_a_job_whose_time_is_up_checkpoints_and_goes_on(small: Setting) -> None:
    """Submitit sends its signal some time before the end, as SLURM does; the job is put back into the queue."""
    pytest.importorskip("submitit")
    own = [line for line in small.with_() if not line.startswith(("trainer.max", "trainer.eval", "trainer.check"))]
    steps = ["trainer.max_steps=400", "trainer.eval_every=200", "trainer.checkpoint_every=400", "sweep.name=two"]
    process, root = start([*own, *steps, "seed_init=0,1", "hydra/launcher=submitit_local"], "-m"), small.out / "two"
    wait_for(lambda: len(metrics_steps(root)) == 2, process)
    os.kill(holder(process, "*-*"), signal.SIGUSR2)
    answer = finish(process)
    assert answer.code == 0, answer
    logs = [path.read_text() for path in root.glob("*/log.txt")]
    assert sorted("resumes after step" in log for log in logs) == [False, True]
    for record in records(root).values():
        found = root / f"{record['variant']}-{record['run_id'][:8]}"
        assert [row["step"] for row in rows(found) if row["kind"] == "eval"] == [0, 200, 400]


# ---- errors in the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs must be a whole number from 1"),
        (["hydra/launcher=joblib", "hydra.launcher.per_gpu=null"], "hydra.launcher.per_gpu must be a whole number"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=two"], "hydra.launcher.n_jobs must be a whole number"),
    ],
)
def test_a_bad_option_of_a_launcher_is_one_line(small: Setting, options: list[str], said: str) -> None:
    answer = cli(small.with_(*TWO, *options), "-m")
    assert answer.code == 2 and said in answer.err and answer.err.count("\n") == 1 and not small.out.exists()


@pytest.mark.parametrize(("launcher", "package"), [("submitit_slurm", "submitit"), ("ray", "ray")])
def test_a_launcher_whose_package_is_missing_names_the_extra(
    small: Setting, monkeypatch: pytest.MonkeyPatch, launcher: str, package: str
) -> None:
    monkeypatch.setitem(os.sys.modules, package, None)  # import fails, as where it is not installed
    answer = cli(small.with_(*TWO, f"hydra/launcher={launcher}"), "-m")
    assert answer.code == 2 and answer.err == f"error: this launcher needs {package}: pip install -e '.[cluster]'\n"
    assert not list(small.out.rglob("launcher"))


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs submitit")
def test_slurm_where_there_is_none_is_one_line(small: Setting) -> None:
    answer = cli(small.with_(*TWO, "hydra/launcher=submitit_slurm"), "-m")
    assert answer.code == 2 and answer.err.startswith("error: hydra/launcher=submitit_slurm: ")
    assert answer.err.count("\n") == 1


# ---- what goes wrong with a run does not touch the others


NAMED = """\
# @package _global_
sweep:
  name: mixed
  arms:
    diverge: [optim.lr=1e9, optim.grad_clip=0]
    die: [trainer.max_steps=100000]
    one: [fusion=gain]
    two: [fusion=weighted]
schedule: {warmup_steps: 0}
trainer: {max_steps: 12, eval_every: 100000, checkpoint_every: 20, log_every: 1}
"""


def named(folder: Path, small: Setting) -> list[str]:
    """Overrides of a sweep in which one run diverges and one lasts until it is killed."""
    (folder / "conf" / "sweep").mkdir(parents=True)
    (folder / "conf" / "sweep" / "mixed.yaml").write_text(NAMED)
    own = [line for line in small.with_() if not re.match(r"trainer\.(max|eval|check|log)|optim|schedule", line)]
    return [*own, "sweep=mixed", *JOBLIB]


@pytest.mark.slow
def test_one_diverges_one_is_killed_twice_and_the_others_complete(tmp_path: Path, small: Setting) -> None:
    """The killed run goes on, alone, from its checkpoint; killed there too, it gets a record that says so."""
    command, config = named(tmp_path, small), f"--config-dir={tmp_path}/conf"
    process, root = start(command, "-m", config), small.out / "mixed"

    def reached(step: int) -> bool:
        return any(name.startswith("die-") and last > step for name, last in metrics_steps(root).items())

    wait_for(lambda: reached(25), process)
    first = holder(process, "die-*")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: holder(process, "die-*") not in (None, first), process)
    assert {record["variant"] for record in records(root).values()} == {"diverge", "one", "two"}
    (log,) = root.glob("die-*/log.txt")
    wait_for(lambda: "resumes after step" in log.read_text() and reached(45), process)
    os.kill(holder(process, "die-*"), signal.SIGKILL)
    answer = finish(process)

    assert answer.code == 1 and answer.err == "error: 2 of 4 runs failed, diverged or are unfinished\n"
    found = {record["variant"]: record for record in records(root).values()}
    assert {arm: record["status"] for arm, record in found.items()} == {
        "diverge": "diverged", "die": "failed", "one": "completed", "two": "completed",
    }  # fmt: skip
    assert found["die"]["stop_reason"] == "its process was killed (out of memory?)"
    assert found["die"].keys() == found["one"].keys() and found["die"]["params"] == found["one"]["params"] | {
        key: found["die"]["params"][key] for key in ("fusion", "total")
    }
    assert "2 of 4 runs have a record" in answer.out
    assert re.search(r"die +│ 0 +│ failed +│ its process was killed", answer.out)
    assert re.search(r"diverge +│ 0 +│ diverged +│ training loss not finite", answer.out)
    before = snapshot(root)
    again = finish(start(command, "-m", config))
    assert again.code == 1 and "4 already done" in again.out
    assert {name for name, state in snapshot(root).items() if before.get(name) != state} <= {"sweep.json"}


@pytest.mark.slow
def test_a_job_that_raises_does_not_stop_the_others(small: Setting) -> None:
    """A folder that cannot be written to: the run has no record, the others have theirs."""
    blocked = small.plan("fusion=gain", "seed_init=1", "sweep.name=two", "variant=gain").folder.path
    blocked.mkdir(parents=True)
    (blocked / "checkpoints").write_text("a file where a folder has to be")
    answer = finish(start(small.with_(*TWO, *JOBLIB), "-m"))
    assert answer.code == 1 and answer.err == "error: 1 of 4 runs failed, diverged or are unfinished\n"
    assert len(records(small.out / "two")) == 3 and not (blocked / "summary.json").exists()
    assert re.search(r"gain +│ 1 +│ unfinished +│ .*File exists", answer.out)


def test_seeds_that_other_keys_refer_to_are_not_taken_for_seeds_alone(small: Setting) -> None:
    """Runs that differ only in their seeds are composed once, where that gives the same."""
    own = [line for line in small.with_() if not line.startswith("trainer.max_steps")]
    command = [*own, "trainer.max_steps=3", "seed_init=1,2", "sweep.name=two"]
    assert cli([*command, "optim.weight_decay=${seed_init}"], "-m").code == 0
    found = sorted((small.out / "two").glob("*/config.yaml"))
    assert sorted(re.search(r"weight_decay: (\S+)", path.read_text())[1] for path in found) == ["1.0", "2.0"]
    assert len(records(small.out / "two")) == 2


# ---- two at once


@pytest.mark.slow
def test_two_sweeps_at_once_run_nothing_twice(basic: Path, small: Setting) -> None:
    both = [start(small.with_(*TWO, *JOBLIB), "-m") for _ in range(2)]
    answers = [finish(process) for process in both]
    assert [answer.code for answer in answers] == [0, 0], answers
    same_runs(small.out / "two", basic)
    begun = [re.findall(r"^(\w+ seed \d): begins$", answer.out, re.MULTILINE) for answer in answers]
    for path in (small.out / "two").glob("*/log.txt"):
        assert path.read_text().count("parameters\n") == 1  # written once by every start of a run
    assert {run for runs in begun for run in runs} == {f"{arm} seed {s}" for arm in ("gain", "gated") for s in (0, 1)}
