"""Reading run folders: what counts, what is left out and why, and that no record can raise an error."""

from __future__ import annotations

import os

import numpy as np
import pytest

from analysis.records.frames import best_first, runs_frame
from analysis.records.json_files import number
from analysis.records.runs import read_records


def kinds(records):
    return {item.folder: item.kind for item in records.left_out}


def test_runs_at_any_depth(tmp_path, make_run):
    make_run(tmp_path / "a" / "b", "gated", 0)
    make_run(tmp_path, "gain", 0)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("no run folder: no log, no checkpoints")
    records = read_records(tmp_path)
    assert [run.arm for run in records.runs] == ["gain", "gated"]
    assert records.left_out == []


def test_a_run_folder_itself(tmp_path, make_run):
    records = read_records(make_run(tmp_path, "gated", 3))
    assert [(run.arm, run.seeds, run.folder) for run in records.runs] == [("gated", (3, 3), ".")]


def test_checkpoints_are_not_searched(tmp_path, make_run):
    folder = make_run(tmp_path, "gated", 0)
    make_run(folder / "checkpoints", "gain", 0)
    assert len(read_records(tmp_path).runs) == 1


def test_unfinished_run_says_how_far_it_came(tmp_path, make_run):
    folder = make_run(tmp_path, "gated", 1, steps=150, finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind":"train","step":16')  # torn while it was written
    (item,) = read_records(tmp_path).left_out
    assert (item.kind, item.last_step, item.arm, item.seed_init) == ("unfinished", 150, "gated", 1)
    assert item.reason == "no summary yet, last step 150 of 150"


def test_just_started_run(tmp_path, make_run):
    folder = make_run(tmp_path, "gated", 1, finished=False)
    (folder / "metrics.jsonl").unlink()
    (item,) = read_records(tmp_path).left_out
    assert (item.kind, item.last_step) == ("unfinished", None)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"status": "diverged", "stop_reason": "loss is not finite", "best_val_loss": None}, "diverged", "not finite"),
        ({"status": "failed", "stop_reason": "out of memory", "params": ...}, "failed", "out of memory"),
        ({"schema": "someone.else/3"}, "foreign", "someone.else/3"),
        ({"schema": ...}, "foreign", "None"),
        ({"status": "dreaming"}, "incomplete", "dreaming"),
        ({"status": ["completed"]}, "incomplete", "unknown status"),
        ({"final_val_loss": None}, "incomplete", "final_val_loss"),
        ({"final_val_loss": "1.5"}, "incomplete", "final_val_loss"),
        ({"final_val_loss": ...}, "incomplete", "lacks final_val_loss"),
        ({"seed_data": ..., "run_id": ...}, "incomplete", "lacks run_id, seed_data"),
        ({"seed_init": "zero"}, "incomplete", "seed"),
        ({"variant": None}, "incomplete", "variant"),
    ],
)
def test_left_out(tmp_path, make_run, changes, kind, words):
    folder = make_run(tmp_path, "gated", 0, edit=changes)
    records = read_records(tmp_path)
    assert records.runs == []
    assert kinds(records) == {folder.name: kind}
    assert words in records.left_out[0].reason


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"[" * 100_000, b'"text"', b"null"])
def test_corrupt_summary(tmp_path, make_run, content):
    folder = make_run(tmp_path, "gated", 0)
    (folder / "summary.json").write_bytes(content)
    assert kinds(read_records(tmp_path)) == {folder.name: "corrupt"}


def test_metric_decides_what_is_usable(tmp_path, make_run):
    make_run(tmp_path, "gated", 0, final_val_loss=None)
    assert len(read_records(tmp_path, "best_val_loss").runs) == 1
    assert len(read_records(tmp_path, "final_val_loss").runs) == 0


def test_missing_optional_values_are_nan(tmp_path, make_run):
    make_run(
        tmp_path, "gated", 0, edit={"params": None, "environment": ..., "data": "text"}, grad_ratio=None, tokens=True
    )
    (row,) = runs_frame(read_records(tmp_path).runs).to_dict("records")
    assert all(np.isnan(row[key]) for key in ("params_total", "grad_ratio", "tokens", "vocab_size"))
    assert row["device"] is None or row["device"] != row["device"]
    assert row["steps"] == 150


def test_a_copied_run_counts_once(tmp_path, make_run):
    make_run(tmp_path / "a", "gated", 0, run_id="ab" * 8)
    make_run(tmp_path / "b", "gated", 0, run_id="ab" * 8)
    records = read_records(tmp_path)
    assert [run.folder for run in records.runs] == ["a/gated-abababab"]
    assert kinds(records) == {"b/gated-abababab": "duplicate"}


def test_two_sweeps_with_the_same_arm_are_told_apart(tmp_path, make_run):
    for sweep in ("smoke", "phase2"):
        make_run(tmp_path / sweep, "gated", 0)
        make_run(tmp_path / sweep, "gated", 1, status="diverged")
    make_run(tmp_path / "smoke", "gain", 0)
    records = read_records(tmp_path)
    assert records.arms == ["gain", "phase2/gated", "smoke/gated"]
    assert {item.arm for item in records.left_out} == {"phase2/gated", "smoke/gated"}


def test_seeds_in_two_folders_are_one_arm(tmp_path, make_run):
    make_run(tmp_path / "monday", "gated", 0)
    make_run(tmp_path / "tuesday", "gated", 1)
    assert read_records(tmp_path).arms == ["gated"]


def test_two_configurations_of_a_variant_are_told_apart(tmp_path, make_run):
    make_run(tmp_path, "gated", 0, run_id="a" * 16, overrides=["fusion=gated", "optim.lr=0.001", "seed_init=0"])
    make_run(tmp_path, "gated", 0, run_id="b" * 16, overrides=["fusion=gated", "optim.lr=0.01", "out=elsewhere"])
    assert read_records(tmp_path).arms == ["gated (optim.lr=0.001)", "gated (optim.lr=0.01)"]


def test_an_older_version_of_a_run_is_superseded(tmp_path, make_run):
    old = make_run(tmp_path, "gated", 0, run_id="a" * 16, final=9.0)
    new = make_run(tmp_path, "gated", 0, run_id="b" * 16, final=1.0)
    os.utime(old / "summary.json", (1000, 1000))
    os.utime(new / "summary.json", (2000, 2000))
    records = read_records(tmp_path)
    assert [run.folder for run in records.runs] == [new.name]
    assert kinds(records) == {old.name: "duplicate"}


def test_plan_says_what_is_missing(tmp_path, make_run, make_plan):
    sweep = tmp_path / "smoke"
    make_plan(sweep, [("gain", 0), ("gain", 1), ("gated", 0), ("gated", 1)])
    make_run(sweep, "gain", 0)
    make_run(sweep, "gated", 0, status="failed")
    make_run(sweep, "gated", 1, finished=False)
    records = read_records(tmp_path)
    missing = [(item.arm, item.seed_init) for item in records.left_out if item.kind == "missing"]
    assert missing == [("gain", 1)]
    assert sorted(kinds(records).values()) == ["failed", "missing", "unfinished"]
    assert records.left_out[0].kind == "failed"  # what went wrong comes before what may still come


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "other"}', '{"schema": "groundthink.sweep/1", "runs": 3}'])
def test_a_broken_plan_does_no_harm(tmp_path, make_run, content):
    make_run(tmp_path, "gain", 0)
    (tmp_path / "sweep.json").write_text(content)
    assert len(read_records(tmp_path).runs) == 1


def test_number():
    assert number(3) == 3.0
    assert all(np.isnan(number(value)) for value in (None, True, "3", float("inf"), 10**400, [1]))


def test_arms_by_their_mean(tmp_path, make_run):
    for arm, losses in {"b": (1.5, 1.5), "a": (1.25, 1.75), "c": (1.0, 1.875)}.items():
        for seed, loss in enumerate(losses):
            make_run(tmp_path, arm, seed, final=loss)
    assert best_first(runs_frame(read_records(tmp_path).runs), "final_val_loss") == ["c", "a", "b"]
