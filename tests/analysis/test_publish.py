"""Copying the records of a sweep: all numbers, no weights, no paths of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from analysis.publish import main
from analysis.report import main as report

PATHS = {"out": "/home/me/runs", "data": {"name": "text", "path": "/home/me/text.txt", "cache_dir": "/home/me/cache"}}
OVERRIDES = ["fusion=gain", "out=/home/me/runs", "data.path=/home/me/text.txt", "+data.cache_dir=/home/me/cache",
             "display.progress=plain", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "data=text", "output=none",
             "optim.lr=0.1"]  # fmt: skip
KEPT = ["fusion=gain", "data=text", "output=none", "optim.lr=0.1"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two arms of two seeds and an unfinished run."""
    folder = tmp_path / "sweep"
    runs = [(arm, seed) for arm in ("gain", "gated") for seed in (3, 4)] + [("gated", 5)]
    for arm, seed in runs:
        run = folder / f"{arm}-{seed}"
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "best.safetensors").write_bytes(b"weights")
        for name in ("metrics.jsonl", "probe.jsonl", "gpu.jsonl", "log.txt", "lock"):
            (run / name).write_text(f'{{"kind": "{name} of {arm} {seed}"}}\n')
        (run / "config.yaml").write_text(yaml.safe_dump({**PATHS, "optim": {"lr": 0.1}}))
        if seed != 5:
            record = {
                "schema": "groundthink.run/1", "variant": arm, "run_id": f"{arm}{seed}", "seed_init": seed,
                "seed_data": seed, "overrides": OVERRIDES, "final_val_loss": 1.0 + seed / 7, "status": "completed",
            }  # fmt: skip
            (run / "summary.json").write_text(json.dumps(record))
    plan = {"schema": "groundthink.sweep/1", "runs": [{"variant": "gain", "overrides": OVERRIDES}]}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_records_are_copied_without_paths(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "results" / "sweep"
    assert main([str(sweep), str(target)]) == 0
    assert capsys.readouterr().out == f"4 runs to {target}; 1 unfinished runs left out\n"
    assert names(target) == {"gain-3", "gain-4", "gated-3", "gated-4", "sweep.json"}
    short, long = {"config.yaml", "metrics.jsonl", "summary.json"}, {"probe.jsonl", "gpu.jsonl"}
    assert names(target / "gain-3") == short | long and names(target / "gain-4") == short
    for path in target.rglob("*"):
        assert path.is_dir() or "/home/me" not in path.read_text(), path
    copied = json.loads((target / "gated-4" / "summary.json").read_text())
    original = json.loads((sweep / "gated-4" / "summary.json").read_text())
    assert copied == original | {"overrides": KEPT}
    assert json.loads((target / "sweep.json").read_text())["runs"] == [{"variant": "gain", "overrides": KEPT}]
    config = yaml.safe_load((target / "gain-3" / "config.yaml").read_text())
    assert config == {"out": "outputs", "data": {"name": "text", "path": None, "cache_dir": None}, "optim": {"lr": 0.1}}
    assert (target / "gain-4" / "metrics.jsonl").read_bytes() == (sweep / "gain-4" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("probes", "seeds"), [("all", {3, 4}), ("none", set())])
def test_whose_probes_are_kept(sweep: Path, tmp_path: Path, probes: str, seeds: set[int]) -> None:
    assert main([str(sweep), str(tmp_path / "copy"), "--probes", probes]) == 0
    found = {int(path.parent.name[-1]) for path in (tmp_path / "copy").glob("*/probe.jsonl")}
    assert found == seeds


def test_a_report_of_the_copy_is_that_of_the_sweep(sweep: Path, tmp_path: Path) -> None:
    assert main([str(sweep), str(tmp_path / "copy")]) == 0
    for folder in (sweep, tmp_path / "copy"):
        assert report([str(folder)]) == 0
    tables = [(folder / "report" / "tables" / "comparison.csv").read_text() for folder in (sweep, tmp_path / "copy")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("place", ["sweep", "sweep/copy", "."])
def test_neither_folder_may_lie_in_the_other(
    sweep: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(sweep)
    assert main([str(sweep), str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and names(sweep) == before


def test_nothing_to_copy_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "missing"), str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err == f"error: no finished runs in {tmp_path}/missing\n"
    assert not (tmp_path / "copy").exists()
