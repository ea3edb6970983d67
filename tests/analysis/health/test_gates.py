"""Gates and stopping rules in summaries: counts, worst readings, flags, and records that hold something else."""

from __future__ import annotations

import pytest

from analysis.comparison.baseline import choose_baseline
from analysis.comparison.compare import compare
from analysis.comparison.verdict import verdict
from analysis.health.gates import gate_names, read_health, stopped_by, worst_rows
from analysis.health.tables import event_table, gate_table, worst_table
from analysis.records.frames import runs_frame
from analysis.records.runs import read_records
from analysis.report import write_report
from analysis.tables.comparison import comparison_frame, sizes_table
from analysis.tables.table import DASH

ARMS = ["gain", "gated"]


def gate(verdict, value=None, reading="", **more):
    return {"verdict": verdict, "value": value, "reading": reading, **more}


def event(rule, step, action="stop", acted=True, reason="why"):
    return {"rule": rule, "step": step, "action": action, "reason": reason, "acted": acted}


@pytest.fixture
def folder(tmp_path, make_run):
    """gain: G4 fails in two of three runs, one learning rate reduced. gated: passes, a rule fired without acting."""
    for seed, ratio in enumerate((0.05, 0.8, 0.02)):
        fails = ratio < 0.1
        gates = {"G3.5": gate("pass", worst="fail", worst_step=50), "G10": gate("n/a"),
                 "G4": gate("fail" if fails else "pass", ratio, f"gradient ratio {ratio}")}  # fmt: skip
        events = [event("plateau", 90, "reduce_lr"), event("plateau", 120, "reduce_lr")] if seed == 1 else []
        make_run(tmp_path, "gain", seed, final=1.5 + 0.01 * seed, gates=gates, stopping={"act": True, "events": events})
        gates = {"G4": gate("pass", 1.0), "G2": gate("pass", 0.99, specified={"verdict": "warn", "value": 5.3})}
        make_run(tmp_path, "gated", seed, final=1.4 + 0.01 * seed, gates=gates,
                 stopping={"act": False, "events": [event("grad_ratio", 60 + seed, acted=False),
                                                    event("plateau", 80, "reduce_lr", acted=False)]})  # fmt: skip
    return tmp_path


def compared(folder, baseline="gated"):
    records = read_records(folder)
    frame = runs_frame(records.runs)
    return compare(records, frame, choose_baseline(records, baseline, "final_val_loss"), "final_val_loss"), records


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_counts_by_arm_and_gate(folder):
    table = gate_table(read_health(read_records(folder).runs).gates, ARMS)
    assert table.header == ["Model", "G2 initial entropy", "G3.5 state health", "G4 balance", "G10"]
    assert texts(table) == [
        ["gain", DASH, "3 pass (3 worse earlier)", "2 fail, 1 pass", "3 n/a"],
        ["gated", "3 pass (as specified: 3 warn)", DASH, "3 pass", DASH],
    ]
    assert table.rows[0][3].sort == 4.0 and table.rows[1][3].sort == 0.0


def test_the_reading_shown_is_farthest_from_the_middle(folder):
    """Values 0.05, 0.8, 0.02, whose middle is 0.05: of the two that fail, 0.02 is farther from it."""
    table = worst_table(read_health(read_records(folder).runs).gates, ARMS)
    assert texts(table) == [["gain", "G4", "fail", "2 of 3", "gradient ratio 0.02", "seed 2"]]


def test_a_gate_that_does_not_apply_is_not_counted_as_judged(tmp_path, make_run):
    for seed, given in enumerate(("n/a", "warn", "n/a")):
        make_run(tmp_path, "gain", seed, gates={"G4": gate(given)})
    gates = read_health(read_records(tmp_path).runs).gates
    (row,) = worst_rows(gates, ["gain"])
    assert (row["count"], row["runs"], row["verdict"]) == (1, 1, "warn")
    assert worst_rows(gates, ["gain"], least="fail") == []


def test_the_comparison_counts_gates_of_this_form(folder):
    comparison, records = compared(folder)
    frame = comparison_frame(comparison, records).set_index("arm")
    assert frame.loc["gain", ["gates_passed", "gates_warned", "gates_failed", "gates_checked"]].tolist() == [4, 0, 2, 6]
    assert texts(sizes_table(frame.reset_index()))[1][-1] == "4 of 6"


def test_flags_in_words(folder):
    comparison, _ = compared(folder)
    flags = [(flag.arm, flag.kind, flag.text, flag.blocking) for flag in comparison.flags]
    assert flags == [
        ("gain", "gate", "gate G4 (balance) fails in 2 of 3 runs, e.g. gradient ratio 0.02", False),
        ("gain", "reduced", "learning rate reduced in 1 of 3 runs (rule plateau, first at step 90)", False),
    ]
    (sentence,) = verdict(comparison).sentences
    assert "Not matched: learning rate reduced in 1 of 3 runs" in sentence.text
    assert "Caution: gate G4 (balance) fails in 2 of 3 runs" in sentence.text


def test_early_stops_are_said_once_and_by_rule(tmp_path, make_run):
    """Two runs stopped by a rule, at other steps and with other numbers in their reasons, are one flag."""
    for seed in range(3):
        make_run(tmp_path, "gated", seed)
        if seed:
            reason = f"overfitting: 7.{seed}% above the best"
            make_run(tmp_path, "gain", seed, status="stopped", stop_reason=reason,
                     stopping={"act": True, "events": [event("overfitting", 90 + seed, reason=reason)]})  # fmt: skip
    make_run(tmp_path, "gain", 0, status="stopped", stop_reason="gate G3 first steps: loss rises by 0.2; gate G4 x: 9")
    comparison, _ = compared(tmp_path)
    assert [flag.text for flag in comparison.flags] == [
        "2 of 3 stopped early (rule overfitting)",
        "1 of 3 stopped early (gate G3 first steps, gate G4 x)",
    ]


def test_stopped_by(tmp_path, make_run):
    events = [event("plateau", 10, "reduce_lr"), event("grad_ratio", 20, acted=False), event("overfitting", 30)]
    make_run(tmp_path, "gain", 0, stopping={"act": True, "events": events})
    make_run(tmp_path, "gain", 1, stopping={"act": True, "events": events[:2]})
    assert [stopped_by(run) for run in read_records(tmp_path).runs] == ["overfitting", None]


def test_event_table(folder):
    table = event_table(read_health(read_records(folder).runs).events, ARMS)
    assert texts(table) == [
        ["gain", "plateau", "reduce the learning rate", "yes", "1", "90", "why"],
        ["gated", "grad_ratio", "stop", "no, noted only", "3", "60", "why"],
        ["gated", "plateau", "reduce the learning rate", "no, noted only", "3", "80", "why"],
    ]


@pytest.mark.parametrize(
    ("gates", "stopping"),
    [
        ({}, {"act": False, "events": []}),
        (None, None),
        ([], []),
        ({"G4": "pass"}, {"events": None}),
        ({"G4": {"verdict": "perhaps"}}, {"events": [3, {}, {"rule": None}]}),
        ({"G4": {"verdict": ["pass"]}}, {"events": "none"}),
    ],
)
def test_other_records_give_no_section(tmp_path, make_run, gates, stopping):
    make_run(tmp_path, "gain", 0, gates=gates, stopping=stopping)
    health = read_health(read_records(tmp_path).runs)
    assert health.gates.empty and health.events.empty
    assert gate_table(health.gates, ["gain"]).rows == worst_table(health.gates, ["gain"]).rows == []
    assert event_table(health.events, ["gain"]).rows == []


def test_odd_entries_are_read_as_far_as_they_go(tmp_path, make_run):
    make_run(tmp_path, "gain", 0, gates={"G4": {"verdict": "fail", "reading": "a\n b", "value": "x", "worst": 3}},
             stopping={"events": [{"rule": "r", "step": None, "action": None, "reason": None}]})  # fmt: skip
    health = read_health(read_records(tmp_path).runs)
    (row,) = health.gates.to_dict("records")
    assert (row["reading"], row["worst"], row["specified"]) == ("a b", "fail", None) and row["value"] != row["value"]
    assert texts(event_table(health.events, ["gain"])) == [["gain", "r", "None", "no, noted only", "1", DASH, DASH]]


def test_gate_names_in_the_order_of_their_numbers(folder):
    gates = read_health(read_records(folder).runs).gates
    assert gate_names(gates) == ["G2", "G3.5", "G4", "G10"]


def test_page_and_files(folder):
    paths = write_report(folder, "gated")
    page, text = paths.html.read_text(), paths.markdown.read_text()
    assert '<section id="health">' in page and 'href="#health"' in page and "2 fail, 1 pass" in page
    assert "## Gates and stopping" in text and "| gain | G4 | fail | 2 of 3 | gradient ratio 0.02 | seed 2 |" in text
    assert len(paths.tables["gates.csv"].read_text().splitlines()) == 1 + 3 * 3 + 3 * 2
    assert "gradient ratio 0.02" in paths.tables["gate_readings.tex"].read_text()
    assert paths.tables["stopping.csv"].exists() and paths.tables["gates.tex"].exists()
