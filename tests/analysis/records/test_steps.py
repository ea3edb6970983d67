"""Reading metrics.jsonl: the same rows whatever else stands in the file and whoever reads it."""

from __future__ import annotations

import json
import os
import sys

import pytest

from analysis.records import steps
from analysis.records.metrics_files import read_files, thinning
from analysis.records.runs import last_step
from analysis.records.steps import StepReader

CURVES = ("step", "loss", "val_loss")
PARENT = os.getpid()


def steps_frame(paths):
    found = StepReader().read(paths, CURVES)
    return found.rows, found.unreadable


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


def written(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_rows_are_left_out_however_they_are_spaced(tmp_path, separators):
    rows = [{"kind": "train", "step": step, "loss": float(step), "lr": 3e-4} for step in range(5, 65, 5)]
    rows.insert(3, {"kind": "eval", "step": 7, "val_loss": 1.5, "gate_mean": [0.5]})
    written(tmp_path, [json.dumps(row, separators=separators) for row in rows])
    found = StepReader().read([tmp_path], CURVES, train_every=3).rows
    assert found["step"].tolist() == [15, 7, 30, 45, 60]
    assert found["loss"].dropna().tolist() == [15, 30, 45, 60]


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "step": 35, "lo{"kind": "train", "step": 35, "loss": 1.0, "lr": 0.0}',  # torn, then resumed
        '{"kind": "train", "step": 35, "loss": 1.0, "lr": 0.0003',
        '{"kind": "train", "step": -35, "loss": 1.0, "lr": 0.0003,}',
        '{"kind": "train", "step": "x", "loss": 1.0, "lr": 0.0003}',
        '{"kind": "other" "step": 35, "loss": 1.0, "lr": 0.0003}',
    ],
)
def test_no_bad_line_is_left_out_unseen(tmp_path, line):
    """Step 35 is none that would be read: the file is read whole, and the line counted."""
    rows = [f'{{"kind": "train", "step": {step}, "loss": 2.0, "lr": 0.0003}}' for step in range(10, 70, 10)]
    written(tmp_path, [*rows[:3], line, *rows[3:]])
    found = StepReader().read([tmp_path], CURVES, train_every=2)
    assert found.unreadable == {tmp_path: 1} and found.rows["step"].tolist() == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(("unit", "read"), [(10**9, [3 * 10**9, 10**10]), (10**11, None)])
def test_steps_of_many_digits(tmp_path, unit, read):
    """Up to 11 digits are found without parsing; a file with more is read whole."""
    logged = [unit, 2 * unit, 3 * unit, 10 * unit]
    written(tmp_path, [json.dumps({"kind": "train", "step": step, "loss": 2.0, "lr": 0.1}) for step in logged])
    assert StepReader().read([tmp_path], CURVES, train_every=3).rows["step"].tolist() == (read or logged)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are used there")
@pytest.mark.parametrize("remember", [False, True])
def test_processes_read_what_threads_read(tmp_path, make_run, monkeypatch, remember):
    folders = [make_run(tmp_path, f"a{i}", 0, gate=0.01 * i, final=1 + 0.1 * i) for i in range(40)]
    with open(folders[30] / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    folders.insert(5, tmp_path / "nowhere")
    expected = StepReader().read(folders, CURVES, ("gate_mean",))
    monkeypatch.setattr(steps, "_BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr(steps, "read_files", _in_another_process)
    reader = StepReader(remember)
    for _ in range(2):
        found = reader.read(folders, CURVES, ("gate_mean",))
        assert found.rows.equals(expected.rows) and found.lists["gate_mean"].equals(expected.lists["gate_mean"])
        assert found.unreadable == expected.unreadable == {folders[31]: 1}


def _in_another_process(*work):
    assert os.getpid() != PARENT
    return read_files(*work)


def _killed(paths, *work):
    if os.getpid() != PARENT and paths[0].name.startswith("a17"):
        os._exit(1)
    return read_files(paths, *work)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are used there")
def test_what_a_killed_process_did_not_read_is_read_all_the_same(tmp_path, make_run, monkeypatch):
    folders = [make_run(tmp_path, f"a{i}", 0, final=1 + 0.1 * i) for i in range(20)]
    expected = StepReader().read(folders, CURVES).rows
    monkeypatch.setattr(steps, "_BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr(steps, "_BATCH", 1)
    monkeypatch.setattr(steps, "read_files", _killed)
    assert StepReader().read(folders, CURVES).rows.equals(expected)
