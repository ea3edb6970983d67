"""Reading run folders: what counts, what is left out and why, and that no record can raise an error."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from analysis.records.frames import runs_frame
from analysis.records.json_files import number
from analysis.records.runs import last_step, read_records
from analysis.records.steps import StepReader, thinning

CURVES = ("step", "loss", "val_loss")


def steps_frame(paths):
    found = StepReader().read(paths, CURVES)
    return found.rows, found.unreadable


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


def test_steps_frame(tmp_path, make_run):
    folders = [make_run(tmp_path, arm, 0, steps=100, log_every=10, eval_every=50) for arm in ("a", "b")]
    frame, unreadable = steps_frame(folders)
    assert unreadable == {}
    assert frame.groupby(["run", "kind"], observed=True).size().to_dict() == {
        (0, "eval"): 2, (0, "train"): 10, (1, "eval"): 2, (1, "train"): 10
    }  # fmt: skip
    assert frame.loc[frame["kind"] == "train", "val_loss"].isna().all()
    assert frame.loc[(frame["run"] == 1) & (frame["kind"] == "eval"), "step"].tolist() == [50, 100]


def test_steps_frame_survives_garbage(tmp_path, make_run):
    """The same rows come out of a file with bad lines (read line by line) as of the clean one (read by the parser)."""
    folder = make_run(tmp_path, "a", 0)
    clean, _ = steps_frame([folder])
    good = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b"garbage\n", b"[1]\n", b'{"kind": 3, "step": 1}\n', b'{"kind": "train"}\n', b"\xff\xfe\n", b"\n"]
    torn = b'{"kind":"train","st'
    (folder / "metrics.jsonl").write_bytes(b"".join(bad + good) + torn)
    frame, unreadable = steps_frame([folder, tmp_path / "nowhere"])
    assert unreadable == {folder: 5}  # not the empty line, not the torn one
    assert frame[["step", "loss", "val_loss"]].equals(clean[["step", "loss", "val_loss"]])


def test_null_nan_and_text_become_nan(tmp_path, make_run):
    folder = make_run(tmp_path, "a", 0)
    rows = ['{"kind":"train","step":1,"loss":null}', '{"kind":"train","step":2,"loss":NaN}',
            '{"kind":"train","step":3,"loss":"x"}', '{"kind":"train","step":4,"loss":2.5}']  # fmt: skip
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    frame, _ = steps_frame([folder])
    assert frame["step"].tolist() == [1, 2, 3, 4]
    assert frame["loss"].isna().tolist() == [True, True, True, False]


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path, make_run):
    folder = make_run(tmp_path, "a", 0, steps=50, log_every=10)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 50, "loss": 7.0}) + "\n")
    frame, _ = steps_frame([folder])
    assert frame.loc[(frame["kind"] == "train") & (frame["step"] == 50), "loss"].tolist() == [7.0]


def test_no_metrics_at_all(tmp_path):
    frame, unreadable = steps_frame([tmp_path])
    assert len(frame) == 0 and set(CURVES) <= set(frame.columns) and unreadable == {}
    assert last_step(tmp_path) is None


def test_number():
    assert number(3) == 3.0
    assert all(np.isnan(number(value)) for value in (None, True, "3", float("inf"), 10**400, [1]))


def test_only_some_training_rows_of_a_large_folder(tmp_path, make_run):
    """Every 4th of 15 training rows and the last one, the same steps whatever was logged twice; all evaluations."""
    folders = [make_run(tmp_path, arm, 0) for arm in ("a", "b", "c")]
    lines = (folders[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folders[1] / "metrics.jsonl").write_text("".join(lines[:7] + lines[4:]))  # resumed
    whole = StepReader().read(folders, CURVES).rows
    thin = StepReader().read(folders, CURVES, train_every=4).rows
    for run in range(3):
        own, full = thin[thin["run"] == run].set_index(["kind", "step"]), whole[whole["run"] == run]
        assert own.loc["train"].index.tolist() == [40, 80, 120, 150] and own.loc["eval"].index.tolist() == [
            50,
            100,
            150,
        ]
        assert (
            own["loss"].dropna().tolist() == full.set_index(["kind", "step"]).loc[own.index, "loss"].dropna().tolist()
        )
    assert thinning(folders) == 1
    with open(folders[2] / "metrics.jsonl", "a") as file:  # a row of another form: read whole
        file.write('{"step": 160, "kind": "train", "loss": 1.0}\n')
    assert len(StepReader().read(folders[2:], CURVES, train_every=4).rows) == 15 + 3 + 1


def test_one_bad_file_among_many_is_read_alone(tmp_path, make_run):
    folders = [make_run(tmp_path, f"a{i}", 0) for i in range(20)]
    clean, _ = steps_frame(folders)
    with open(folders[3] / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    rows, unreadable = steps_frame(folders)
    assert rows.equals(clean) and unreadable == {folders[3]: 1}
