"""diagnosis.json: what is read of it, and that nothing in it can raise an error or get lost silently."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from analysis.diagnosis.records import ALL_LAYERS, COLUMNS, read_diagnoses
from analysis.records.runs import read_records
from tests.analysis.diagnosis.diagnosis_files import diagnosis, write_diagnosis


@pytest.fixture
def run(tmp_path, make_run):
    return make_run(tmp_path, "gated", 3, final=1.5)


def read(run):
    return read_diagnoses(read_records(run.parent).runs)


def test_every_part_is_read(run):
    write_diagnosis(run, layers=2, last_lag=4)
    found, notes = read(run)
    assert notes == [] and found.arms == ["gated"] and found.branches("gated") == ["rwkv", "mamba"]
    for name, columns in COLUMNS.items():
        assert list(found[name].columns) == ["arm", "seed_init", "seed_data", *columns]
        assert (found[name][["arm", "seed_init", "seed_data"]] == ["gated", 3, 3]).all(axis=None)
    necessity = found["necessity"]
    assert len(necessity) == 3 * 2 * 3  # interventions, branches, two layers and all of them
    everywhere = necessity[(necessity["layer"] == ALL_LAYERS) & (necessity["intervention"] == "zero")]
    assert everywhere.set_index("branch")["increase"].to_dict() == {"rwkv": 0.12, "mamba": 0.40}
    assert necessity.loc[necessity["layer"] == 1, "increase"].max() == pytest.approx(0.06)
    assert set(necessity["error"]) == {0.005} and set(necessity["control"]) == {0.01, 0.001}
    full = found["influence"][found["influence"]["path"] == "full"]
    assert full[["lag", "nats"]].to_numpy().tolist() == [[1, 0.5], [2, 0.25], [4, 0.125]]
    lives = found["half_lives"].set_index(["layer", "branch", "head"])
    assert lives.loc[(1, "mamba", 0), ["p10", "p50", "p90"]].tolist() == [1, 2, 8]
    assert lives.loc[(1, "mamba", 1), "p90"] == math.inf  # null
    gates = found["gates"][["layer", "start", "mean", "saturated_high"]].to_numpy()
    assert gates == pytest.approx(np.array([[0, 0.3, 0.3, 0.0], [1, 0.3, 0.4, 0.2]]))
    assert len(found["gate_positions"]) == 2 * 32 and len(found["gate_classes"]) == 2 * 7
    outputs = found["outputs"].set_index(["layer", "branch"])
    assert outputs.loc[(0, "mamba"), ["rms", "rms_normed", "contribution", "cosine"]].tolist() == [1.5, 1.0, 0.7, 0.05]
    assert dict(zip(found["updates"]["group"], found["updates"]["ratio"], strict=True))["fusion"] == 5e-3
    assert found["position_loss"]["loss"].iloc[0] == 3.5


def test_parts_may_be_missing(run):
    """A model without gates and with one branch; a document without memory; a layer without parts of a sum."""
    output = {"layer": 0, "rms": {"mamba": 2.0}, "rms_normed": None, "share": None, "cosine": None}
    write_diagnosis(run, branches=("mamba",), gates=False, memory=None, updates=None, outputs=[output])
    found, notes = read(run)
    assert notes == [] and found.branches("gated") == ["mamba"]
    for name in ("gates", "gate_positions", "gate_classes", "influence", "half_lives", "position_loss", "updates"):
        assert found[name].empty
    (output,) = found["outputs"].to_dict("records")
    assert output["rms"] == 2.0 and math.isnan(output["contribution"]) and math.isnan(output["cosine"])


def test_nan_and_null_are_no_numbers(run):
    content = diagnosis(run)
    content["necessity"][0] |= {"loss_increase": None, "control": math.nan}
    (run / "diagnosis.json").write_text(json.dumps(content))
    found, notes = read(run)
    assert notes == [] and found["necessity"].iloc[0][["increase", "control"]].isna().all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schema": "groundthink.diagnosis/2"}, "schema 'groundthink.diagnosis/2' instead of"),
        ({"schema": None}, "schema 'None' instead of"),
        ({"run_id": "0" * 16}, "of another run ('0000000000000000')"),
        ({"branches": "rwkv"}, "branches is no list of names"),
        ({"branches": []}, "branches is no list of names"),
        ({"necessity": {}}, "necessity is a dict, not a list"),
        ({"necessity": [1]}, "necessity holds something that is no object"),
        ({"necessity": [{"layer": "x"}]}, "necessity has the layer 'x'"),
        ({"outputs": [{"layer": -1, "rms": {"rwkv": 1}}]}, "outputs has the layer '-1'"),
        ({"memory": []}, "memory is a list, not an object"),
        ({"memory": {"influence": {"lags": [1, 2], "full": [0.1]}}}, "lags and full differ in length (2 and 1)"),
        ({"memory": {"influence": {"full": [0.1]}}}, "lags is no list"),
        ({"gates": {"layers": [{"layer": 0, "by_position": [0.3]}]}}, "positions is no list"),
        ({"updates": 3}, "updates is a int, not an object"),
    ],
)
def test_unusable_files_are_named_in_one_line(run, changes, why):
    (run / "diagnosis.json").write_text(json.dumps(diagnosis(run) | changes))
    found, (note,) = read(run)
    assert found is None
    assert note.startswith(f"{run.name}: diagnosis.json") and why in note and "\n" not in note
    assert note.endswith("the diagnosis is not used")


def test_no_json_is_named_in_one_line(run):
    for content in (b'{"schema": ', b"[]", b"\xff\xfe", b""):
        (run / "diagnosis.json").write_bytes(content)
        found, (note,) = read(run)
        assert found is None and note.startswith(f"{run.name}: diagnosis.json") and "\n" not in note


def test_a_bad_file_does_not_take_the_others_along(tmp_path, make_run):
    runs = [make_run(tmp_path, "gated", seed) for seed in range(3)]
    for run in runs[:2]:
        write_diagnosis(run)
    (runs[0] / "diagnosis.json").write_text("{")
    found, notes = read_diagnoses(read_records(tmp_path).runs)
    assert len(notes) == 1 and found["about"]["seed_init"].tolist() == [1]


def test_runs_without_a_diagnosis_are_not_mentioned(run):
    assert read(run) == (None, [])
