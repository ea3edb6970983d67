"""Four real records (two fusions, two seeds, 40 steps on a CPU) against tables worked out from them by other means.

``golden/comparison.csv`` and ``golden/steps.csv`` were computed from the JSON files with Python's ``statistics`` and
``csv``, without anything of ``analysis``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.export import export
from analysis.report import write_report

RECORDS = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return Path(shutil.copytree(RECORDS / "smoke", tmp_path_factory.mktemp("golden") / "smoke"))


def assert_same(found, expected):
    for column in expected.columns:
        if pd.api.types.is_numeric_dtype(expected[column]):
            values = found[column].astype(float).to_numpy()
            assert values == pytest.approx(expected[column].astype(float).to_numpy(), rel=1e-9, nan_ok=True), column
        else:
            assert found[column].tolist() == expected[column].tolist(), column


def test_comparison(smoke):
    paths = write_report(smoke, "gain")
    found = pd.read_csv(paths.tables["comparison.csv"]).sort_values("arm").reset_index(drop=True)
    assert_same(found, pd.read_csv(RECORDS / "comparison.csv"))
    names = {name for name in paths.figures if name.endswith(".png")}
    assert names >= {"final_loss.png", "learning_curves.png", "gate_values.png", "gradient_ratio.png"}


def test_export(smoke):
    written, remarks = export(smoke, smoke / "export", "csv")
    assert remarks == []
    assert_same(pd.read_csv(written["steps"]), pd.read_csv(RECORDS / "steps.csv"))
    runs = pd.read_csv(written["runs"])
    assert runs["counts"].all() and runs["status"].tolist() == ["completed"] * 4
