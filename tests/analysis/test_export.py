"""The two tidy tables: every run, every logged step, nothing lost and nothing invented."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow.parquet
import pytest

from analysis.export import export, main
from tests.analysis.search.search_files import trial, write_search, write_trial_runs


@pytest.fixture
def folder(tmp_path, make_run):
    make_run(tmp_path, "gated", 0, final=1.5, gate=0.25)
    make_run(tmp_path, "gain", 1, status="diverged", stop_reason="loss is not finite", best_val_loss=None)
    make_run(tmp_path, "concat", 2, finished=False, steps=50)
    return tmp_path


def tables(folder, file_format="parquet"):
    written, remarks = export(folder, folder / "out", file_format)
    read = pd.read_parquet if file_format == "parquet" else pd.read_csv
    return read(written["runs"]), read(written["steps"]), remarks


def test_runs(folder):
    runs, _, remarks = tables(folder)
    runs = runs.set_index("arm")
    assert remarks == [] and set(runs.index) == {"gated", "gain", "concat"}
    assert runs["counts"].to_dict() == {"gated": True, "gain": False, "concat": False}
    assert runs.loc["gain", "left_out"] == "diverged at step 150: loss is not finite"
    row = runs.loc["gated"]
    assert (row["final_val_loss"], row["params.total"], row["environment.kernels.ssd"]) == (1.5, 3_500_000, "torch")
    assert row["state_floats_per_layer.3"] == 36_864 and row["overrides"] == "fusion=gated seed_init=0"


def test_steps(folder):
    _, steps, _ = tables(folder)
    counts = steps.groupby(["arm", "kind"]).size().to_dict()
    assert counts == {  # 150 steps, logged every 10, evaluated every 50; the unfinished run came to 50
        ("gated", "train"): 15, ("gated", "eval"): 3, ("gain", "train"): 15, ("gain", "eval"): 3,
        ("concat", "train"): 5, ("concat", "eval"): 1,
    }  # fmt: skip
    own = steps[steps["arm"] == "gated"]
    evaluated = own[own["kind"] == "eval"]
    assert evaluated[[f"gate_mean.{i}" for i in range(4)]].to_numpy().tolist() == [[0.25] * 4] * 3
    assert own.loc[own["kind"] == "train", "gate_mean.0"].isna().all()
    assert own["seed_init"].unique().tolist() == [0] and own["run_id"].nunique() == 1
    logged = [json.loads(line) for line in (folder / own["folder"].iloc[0] / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_ratio", "val_loss", "wall_seconds"):
        expected = [row.get(name) for row in logged]
        assert own[name].astype(object).where(own[name].notna(), None).tolist() == expected


def test_both_formats_hold_the_same(folder):
    for parquet, csv in zip(tables(folder)[:2], tables(folder, "csv")[:2], strict=True):
        assert list(parquet.columns) == list(csv.columns)
        for column in parquet.columns:
            a, b = parquet[column], csv[column]
            if pd.api.types.is_numeric_dtype(b) and not pd.api.types.is_bool_dtype(b):
                assert a.astype(float).to_numpy() == pytest.approx(b.astype(float).to_numpy(), nan_ok=True), column
            else:
                a, b = ([None if pd.isna(value) else str(value) for value in values] for values in (a, b))
                assert a == b, column


def test_awkward_rows(folder, capsys):
    """A bad line, a repeated step, a text among numbers, nested fields and lists of several lengths."""
    rows = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "train", "step": 1, "loss": 3.0},
            {"kind": "eval", "step": 1, "gate_mean": [0.1]}, {"kind": "eval", "step": 2, "gate_mean": [0.1, 0.2]},
            {"kind": "train", "step": 2, "loss": "high", "more": {"a": 1}}]  # fmt: skip
    metrics = next(folder.glob("concat*")) / "metrics.jsonl"
    metrics.write_text("garbage\n" + "".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    _, steps, remarks = tables(folder)
    assert remarks == [f"{metrics.parent.name}/metrics.jsonl: 1 unreadable lines skipped"]
    own = steps[steps["arm"] == "concat"]
    assert own[["kind", "step"]].to_numpy().tolist() == [["train", 1], ["eval", 1], ["eval", 2], ["train", 2]]
    assert own["loss"].dropna().tolist() == ["3.0", "high"]
    assert own["gate_mean.1"].dropna().tolist() == [0.2] and own["more.a"].dropna().tolist() == [1]


def test_trials_are_marked(tmp_path, make_run):
    trials = [trial(0, 1e-3, 1.5), trial(1, 1e-3, None, state="RUNNING")]
    write_search(tmp_path, trials)
    write_trial_runs(make_run, tmp_path, trials)
    runs, _, _ = tables(tmp_path)
    assert runs["trial"].tolist()[:1] == [0] and runs["counts"].tolist() == [False, False]


def test_command_line(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "export" / f"{name}.parquet") for name in ("runs", "steps")]
    assert pyarrow.parquet.read_metadata(folder / "export" / "steps.parquet").num_rows == 42
    for wrong in (folder / "nowhere", next(folder.glob("gated*")) / "checkpoints"):
        assert main([str(wrong)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
