"""Two folders, before and after a change: arms by name, runs by seed, B minus A."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis.compare import compare_folders, headline, main, write_comparison

ROOT = Path(__file__).resolve().parents[2]
BEFORE = (1.60, 1.58, 1.60)  # with AFTER: differences -0.10, -0.06, -0.12, the example of test_report_statistics
AFTER = (1.50, 1.52, 1.48)


@pytest.fixture
def folders(tmp_path, make_run):
    a, b = tmp_path / "a", tmp_path / "b"
    for seed, (before, after) in enumerate(zip(BEFORE, AFTER, strict=True)):
        make_run(a, "gated", seed, final=before)
        make_run(b, "gated", seed, final=after, environment__code_version="w" * 12)
        make_run(a, "gain", seed, final=1.5 + 0.1 * seed)
        make_run(b, "gain", seed, final=1.5 + 0.1 * seed + (0.01, -0.02, 0.01)[seed])
    make_run(a, "gated", 7, final=99.0)  # has no partner
    make_run(a, "old", 0)
    make_run(b, "new", 0)
    return a, b


def test_differences_by_hand(folders):
    found = compare_folders(*folders)
    rows = found.differences.set_index("arm")
    row = rows.loc["gated"]
    assert (row["pairs"], row["difference"]) == (3, pytest.approx(-0.28 / 3))
    assert row["p"] == pytest.approx(1 - math.sqrt(28 / 30)) and row["p_holm"] == pytest.approx(2 * row["p"])
    assert row["not_the_same"] == "code version"
    assert rows.loc["gain", "difference"] == pytest.approx(0, abs=1e-12) and not rows.loc["gain", "shown"]
    assert rows.loc["gain", "not_the_same"] == ""
    assert "only in A: old" in found.notes and "only in B: new" in found.notes
    assert headline(found) == "No change shown in 2 arms (final validation loss, B minus A)."


def test_a_clear_change_is_called_one(tmp_path, make_run):
    for seed in range(4):
        for folder, shift in (("a", 0.0), ("b", 0.05)):
            make_run(tmp_path / folder, "gated", seed, final=1.5 + 0.1 * seed + shift * (1 + 0.01 * seed))
    assert headline(compare_folders(tmp_path / "a", tmp_path / "b")) == (
        "gated got worse (final validation loss, B minus A)."
    )
    assert headline(compare_folders(tmp_path / "a", tmp_path / "a")) == (
        "Exactly the same final validation loss in all 4 pairs of runs."
    )


def test_other_data_is_not_compared(tmp_path, make_run):
    for seed in range(3):
        make_run(tmp_path / "a", "gated", seed, final=1.5)
        make_run(tmp_path / "b", "gated", seed, final=0.5, data__sha256="f" * 64)
    found = compare_folders(tmp_path / "a", tmp_path / "b")
    assert found.differences.loc[0, "pairs"] == 0 and not found.differences.loc[0, "comparable"]
    assert "gated: other data, so losses cannot be compared" in found.notes
    assert headline(found).startswith("Nothing can be compared: the folders were trained on other data")


def test_files(folders, tmp_path):
    found = compare_folders(*folders)
    paths = {path.name: path for path in write_comparison(found, tmp_path / "out")}
    assert set(paths) == {"differences.csv", "differences.md", "differences.tex"}
    assert pd.read_csv(paths["differences.csv"])["pairs"].tolist() == found.differences["pairs"].tolist()
    assert "| gated | 3 |" in paths["differences.md"].read_text()
    assert "gated & 3 &" in paths["differences.tex"].read_text()


def test_command_line(folders, capsys):
    a, b = folders
    done = subprocess.run(
        [sys.executable, "-m", "analysis.compare", str(a), str(b)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "No change shown in 2 arms" in done.stdout and "only in A: old" in done.stdout
    assert (b / "report" / "compare-a" / "differences.csv").exists()
    for arguments in ([a / "nowhere", b], [a, a / "nowhere"]):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1
