"""Learning rates, firmness of the ranking, the A/A check, and the tables and files of all findings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from analysis.comparison.baseline import Baseline, choose_baseline
from analysis.comparison.compare import block_table, compare
from analysis.comparison.finding_words import remarks
from analysis.records.frames import runs_frame
from analysis.records.runs import read_records
from analysis.statistics.false_alarms import false_alarms
from analysis.statistics.ranks import Settling, first_places, kendall_tau, mean_curves, settling
from analysis.tables.comparison import comparison_frame
from analysis.tables.files import finding_tables, write_tables

RATES = ("0.0003", "0.001", "0.003")
# gain is best at 0.001, gated at the highest rate tried
LOSSES = {"gain": (1.60, 1.50, 1.55), "gated": (1.58, 1.52, 1.40)}


@pytest.fixture(scope="module")
def rate_sweep(tmp_path_factory, make_run) -> Path:
    folder = tmp_path_factory.mktemp("lr")
    random = np.random.default_rng(1)
    for fusion, losses in LOSSES.items():
        for rate, loss in zip(RATES, losses, strict=True):
            for seed in range(4):
                final = loss + 0.1 * seed + 0.004 * random.normal()
                overrides = [f"fusion={fusion}", f"optim.lr={rate}", f"seed_init={seed}"]
                make_run(folder, f"{fusion}-lr={rate}", seed, final=final, overrides=overrides)
    return folder


def compared(folder, baseline=None):
    records = read_records(folder)
    chosen = choose_baseline(records, baseline, "final_val_loss")
    return compare(records, runs_frame(records.runs), chosen, "final_val_loss"), records


def test_each_arm_at_its_own_best_rate(rate_sweep):
    comparison, _ = compared(rate_sweep, "gain-lr=0.001")
    found = comparison.findings.learning_rates
    best = found.table[found.table["best"]].set_index("group")
    assert best["lr"].to_dict() == {"gain": 0.001, "gated": 0.003}
    assert found.edges == ["gated"]
    rows = found.differences.set_index("at")
    assert set(rows.index) == {"own best", "0.0003", "0.001", "0.003"}
    table = block_table(comparison.runs, "final_val_loss")
    expected = (table.loc["gated-lr=0.003"] - table.loc["gain-lr=0.001"]).mean()
    assert rows.loc["own best", "difference"] == pytest.approx(expected) and rows.loc["own best", "shown"]
    shared = (table.loc["gated-lr=0.0003"] - table.loc["gain-lr=0.0003"]).mean()
    assert rows.loc["0.0003", "difference"] == pytest.approx(shared)
    assert [(f.arm, f.kind) for f in comparison.flags if f.kind == "lr"] == [("gated-lr=0.003", "lr")]
    said = remarks(comparison.findings)
    assert any(line.startswith("gated beats gain by 0.") and "own best learning rate" in line for line in said)
    assert any("edge of the range" in line for line in said) and any("same seeds" in line for line in said)
    assert comparison.findings.factorial is None  # the rate is no factor of interest


def test_a_rate_that_only_some_override(tmp_path, make_run):
    for rate in ("", "0.003"):
        folder = make_run(
            tmp_path, f"gain{rate}", 0, overrides=["fusion=gain"] + ([f"optim.lr={rate}"] if rate else [])
        )
        (folder / "config.yaml").write_text(
            "fusion:\n  lr: 9\noptim:\n  name: adamw\n  lr: 0.001\nschedule:\n  lr: 7\n"
        )
    comparison, _ = compared(tmp_path, "gain")
    assert comparison.findings.learning_rates.table["lr"].tolist() == [0.001, 0.003]
    assert comparison.findings.learning_rates.table["group"].unique().tolist() == ["all arms"]


def test_first_places_by_hand():
    # two blocks; drawn twice the first (1/4): a first; twice the second (1/4): b; both (1/2): a, by 0.1
    shares = first_places(np.array([[1.0, 2.0], [1.3, 1.8]]))
    assert shares == pytest.approx([0.75, 0.25], abs=0.02) and shares.sum() == pytest.approx(1)
    assert first_places(np.array([[1.0, 1.0], [1.0, 1.0]])) == pytest.approx([0.5, 0.5])
    assert first_places(np.array([[1.0, math.nan], [1.3, 1.8]])) is None  # one seed in common


def test_kendall_tau_against_scipy():
    random = np.random.default_rng(2)
    for a, b in (random.normal(size=(2, 7)), random.integers(0, 3, size=(2, 9))):
        assert kendall_tau(a, b) == pytest.approx(scipy.stats.kendalltau(a, b).statistic)
    assert math.isnan(kendall_tau(np.ones(3), np.arange(3)))


def test_when_the_ranking_settles():
    # final order a < b < c; at 10 all turned round (tau -1), at 20 one pair of three (tau 1/3), from 30 on settled
    curves = pd.DataFrame(
        {"a": [3, 1, 1, 1], "b": [2, 3, 2, 2], "c": [1, 2, 3, 3]}, index=[10, 20, 30, 40], dtype=float
    )
    found = settling(curves)
    assert found.taus.tolist() == pytest.approx([-1, 1 / 3, 1, 1]) and found.settled == 30
    assert settling(curves.iloc[2:]).settled == 30
    assert settling(curves.iloc[[0, 1]]).settled == 20  # only the last step agrees with itself
    assert settling(curves.iloc[:1]).settled is None


def test_mean_curves_take_whole_steps():
    runs = pd.DataFrame({"arm": ["a", "a", "b"]})
    rows = [(0, 10, 1.0), (1, 10, 3.0), (2, 10, 5.0), (0, 20, 1.0), (2, 20, 4.0)]
    steps = pd.DataFrame(rows, columns=["run", "step", "val_loss"]).assign(kind="eval")
    steps = pd.concat([steps, steps.assign(kind="train", val_loss=99.0)])
    curves = mean_curves(steps, runs)
    assert curves.loc[10].to_dict() == {"a": 2.0, "b": 5.0}
    assert math.isnan(curves.loc[20, "a"])  # one of its runs has not got there


def test_false_alarms_are_what_the_level_promises():
    random = np.random.default_rng(3)
    rates = []
    for _ in range(60):
        a, b = random.normal(size=(2, 10)) + random.normal(size=10)
        found = false_alarms(a, b, 5)
        assert (found.of, found.comparisons) == (10, 252 * 16) and found.low <= found.rate <= found.high
        assert found.effective >= 2
        rates.append(found.rate)
    assert np.mean(rates) == pytest.approx(0.05, abs=3 * np.std(rates) / math.sqrt(60))
    plain = false_alarms(a, b, 5, exchange=False)
    assert plain.comparisons == 252


def test_false_alarms_of_a_real_difference():
    noise = 0.01 * np.random.default_rng(4).normal(size=10)
    found = false_alarms(np.arange(10.0), np.arange(10.0) + 1 + noise, 5, exchange=False)
    assert found.rate == 1.0 and found.low == pytest.approx(0.025 ** (1 / 2))  # worth 10 / 5 comparisons
    assert false_alarms(np.arange(4.0), np.arange(4.0), 5) is None


def test_the_a_a_sweep_is_recognised(tmp_path, make_run, make_plan):
    random = np.random.default_rng(5)
    folder = tmp_path / "aa_check"
    make_plan(folder, [(arm, seed) for arm in "ab" for seed in range(6)], baseline="a", name="aa_check")
    for arm in "ab":
        for seed in range(6):
            make_run(folder, arm, seed, final=1.5 + 0.01 * random.normal(), overrides=[f"init.stream={arm == 'b':d}"])
    comparison, _ = compared(folder)
    assert [one.seeds for one in comparison.findings.false_alarms] == [3, 5]
    assert any("same arm under two names" in line for line in remarks(comparison.findings))


def test_all_tables_as_files(tmp_path, make_run, make_plan):
    random = np.random.default_rng(6)
    folder = tmp_path / "phase3"
    fusions = {
        "gain": ["fusion=gain"],
        "gated_0.3": ["fusion=gated", "fusion.gate_init=0.3"],
        "concat": ["fusion=concat"],
    }
    for fusion, lines in fusions.items():
        for norm in ("none", "rms"):
            for seed in range(5):
                arm = f"{fusion}-branch_norm={norm}"
                final = 1.5 + 0.1 * (norm == "rms") + 0.003 * random.normal()
                make_run(folder, arm, seed, final=final, overrides=[*lines, f"fusion.branch_norm={norm}"])
    comparison, records = compared(folder, "gain-branch_norm=none")
    written = write_tables(tmp_path / "tables", comparison_frame(comparison, records), comparison, records)
    names = {path.name for path in written}
    words = ("comparison", "sizes", "differences", "fusion", "ranks")
    words += ("factorial_terms", "factorial_effects", "factorial_cells")
    assert names >= {f"{name}.{kind}" for name in words for kind in ("md", "tex")}
    assert names >= {
        "comparison.csv",
        "differences.csv",
        "factorial_terms.csv",
        "ranks.csv",
        "runs.csv",
        "left_out.csv",
    }
    tables = finding_tables(comparison)
    assert tables["factorial_cells"].header == ["branch_norm", "gain", "concat", "gated, gate_init=0.3"]
    assert [row[0].text for row in tables["factorial_cells"].rows] == ["none", "rms"]
    assert tables["fusion"].header[:4] == ["Model", "fusion", "branch_norm", "gate_init"]
    (norm, *_) = remarks(comparison.findings)
    assert norm.startswith("branch_norm=rms costs 0.1") and "averaged over fusion and gate_init" in norm
    tex = (tmp_path / "tables" / "fusion.tex").read_text()
    assert r"gain-branch\_norm=none" in tex and r"\toprule" in tex and "$\\pm$" in tex
    lines = tex.splitlines()
    assert len({line.count("&") - line.count(r"\&") for line in lines if line.endswith(r"\\")}) == 1

    for path in (folder).glob("*rms*"):  # half of the sweep gone: so are its factors
        (path / "summary.json").unlink()
    comparison, records = compared(folder, "gain-branch_norm=none")
    write_tables(tmp_path / "tables", comparison_frame(comparison, records), comparison, records)
    assert not list((tmp_path / "tables").glob("factorial*"))


def test_a_baseline_that_cannot_be_compared_has_no_findings(tmp_path, make_run):
    make_run(tmp_path, "a", 0, data__sha256="f" * 64)
    make_run(tmp_path, "a", 1)
    make_run(tmp_path, "b", 0)
    comparison, _ = compared(tmp_path, "a")
    assert comparison.baseline == Baseline("a", "given") and comparison.findings.first_places is None


@pytest.mark.parametrize(("seeds", "told"), [(4, False), (5, True)])
def test_few_seeds_do_not_vote_for_a_first_place(tmp_path, make_run, seeds, told):
    """Of two or three seeds all agree by chance in half or a quarter of the sweeps: a bootstrap would say 100%."""
    for seed in range(seeds):
        make_run(tmp_path, "a", seed, final=1.5)
        make_run(tmp_path, "b", seed, final=1.6 + 0.01 * seed)
    comparison, _ = compared(tmp_path, "a")
    assert (comparison.findings.first_places is not None) == told
    assert any("bootstrap" in line for line in remarks(comparison.findings)) == told


def test_a_ranking_that_settles_at_the_end_is_not_settled(tmp_path, make_run):
    taus = pd.Series([0.2, 1.0], index=[50, 100])
    comparison, _ = compared(make_run(tmp_path, "a", 0).parent)
    for settled, words in ((100.0, "still changing before the last"), (50.0, "From step 50 of 100 on")):
        comparison.findings.settling = Settling(taus, settled)
        assert any(words in line for line in remarks(comparison.findings))
