"""Runs that trained in one process: their time is counted once, their speed and memory are compared with like alone."""

from __future__ import annotations

import pandas as pd
import pytest

from analysis.comparison.baseline import choose_baseline
from analysis.comparison.cautions import unlike_speeds
from analysis.comparison.compare import Comparison, compare
from analysis.comparison.flags import matches
from analysis.comparison.verdict import verdict
from analysis.figures.curves import CurveReading
from analysis.figures.drawing import _figures
from analysis.figures.style import arm_styles, look
from analysis.figures.tradeoffs import tradeoffs
from analysis.page.environment import environment
from analysis.records.frames import runs_frame
from analysis.records.runs import read_records
from analysis.records.steps import StepReader
from analysis.records.together import NOTE
from analysis.report import main
from analysis.tables.comparison import comparison_frame, comparison_table

KEY = "environment__members"
SPEEDS = {"base": 30_000.0, "mid": 40_000.0, "fast": 50_000.0}


def arms(make_run, root, speeds=SPEEDS, **sizes):
    """An arm of two seeds for each of ``sizes``: the members of either run. The faster, the worse: all are in front."""
    for i, (arm, members) in enumerate(sizes.items()):
        for seed, count in enumerate(members):
            edit = {KEY: count} if count is not None else {}
            make_run(root, arm, seed, final=1.5 + 0.1 * i + 0.01 * seed * i, tokens_per_second=speeds[arm], edit=edit)


def compared(root, baseline="base") -> Comparison:
    records = read_records(root)
    return compare(
        records, runs_frame(records.runs), choose_baseline(records, baseline, "final_val_loss"), "final_val_loss"
    )


def fact(runs, name):
    return next(found for found in environment(runs) if found.name == name)


@pytest.mark.parametrize(
    ("recorded", "members"), [(5, 5), (5.0, 5), (None, 1), (0, 1), (-3, 1), (2.5, 1), ("5", 1), (True, 1)]
)
def test_members_of_a_record(tmp_path, make_run, recorded, members):
    make_run(tmp_path, "base", 0, edit={KEY: recorded})
    make_run(tmp_path, "base", 1)  # an older record, without the key
    assert runs_frame(read_records(tmp_path).runs)["members"].tolist() == [members, 1]


def test_shared_time_is_counted_once(tmp_path, make_run):
    for seed in range(5):
        make_run(tmp_path, "five", seed, wall_seconds=300.0, edit={KEY: 5})
    for seed in range(2):
        make_run(tmp_path, "two", seed, wall_seconds=80.0, edit={KEY: 2})
    make_run(tmp_path, "alone", 0, wall_seconds=60.0)
    runs = runs_frame(read_records(tmp_path).runs)
    # a process of 300 s, one of 80 s and one of 60 s
    assert fact(runs, "Time of all runs").text == "7 min 20 s; runs trained together share their time"
    assert fact(runs[runs["arm"] == "alone"], "Time of all runs").text == "1 min 0 s"


def test_arms_in_groups_of_other_sizes_are_flagged(tmp_path, make_run):
    arms(make_run, tmp_path, base=(None, 1), mid=(5, 5), fast=(2, 5))
    comparison = compared(tmp_path)
    assert [(f.arm, f.kind, f.text, f.blocking) for f in comparison.flags] == [
        ("mid", "together", "runs trained together 5 instead of 1; speed and memory are not comparable", False),
        (
            "fast",
            "together",
            "its own runs differ in runs trained together: 2, 5; speed and memory are not comparable",
            False,
        ),
    ]
    (match,) = (m for m in matches(comparison.runs, "base") if m.what == "Runs trained together")
    assert (match.same, match.text) == (False, "1, 2, 5")


def test_losses_stay_comparable(tmp_path, make_run):
    arms(make_run, tmp_path, base=(1, 1), mid=(5, 5), fast=(2, 5))
    found = verdict(compared(tmp_path))
    assert "together" not in " ".join([found.headline, *(sentence.text for sentence in found.sentences)])
    assert "Not matched" not in str(found)
    assert [caution for caution in found.cautions if "together" in caution] == [
        "Speed and memory are not comparable where the number of runs trained together differs: "
        "1 in base; 2 to 5 in fast; 5 in mid."
    ]


def test_one_arm_of_unlike_runs(tmp_path, make_run):
    arms(make_run, tmp_path, base=(1, 5))
    comparison = compared(tmp_path)
    assert [(f.arm, f.kind) for f in comparison.flags] == [("base", "together")]
    assert verdict(comparison).cautions == [
        "Speed and memory are not comparable where the number of runs trained together differs: 1 to 5 in base."
    ]


@pytest.mark.parametrize(("members", "shown"), [(5, True), (1, False), (None, False)])
def test_arms_that_trained_alike_are_not_flagged(tmp_path, make_run, members, shown):
    arms(make_run, tmp_path, base=(members, members), mid=(members, members))
    comparison = compared(tmp_path)
    assert comparison.flags == [] and not any("together" in caution for caution in verdict(comparison).cautions)
    found = [(m.same, m.text) for m in matches(comparison.runs, "base") if m.what == "Runs trained together"]
    assert found == ([(True, "5")] if shown else [])


def test_column_of_the_comparison(tmp_path, make_run):
    arms(make_run, tmp_path, base=(1, 1), mid=(5, 5), fast=(2, 5))
    make_run(tmp_path, "lost", 0, status="diverged", best_val_loss=None, edit={KEY: 8})
    comparison = compared(tmp_path)
    frame = comparison_frame(comparison, read_records(tmp_path))
    table = comparison_table(frame)
    assert table.header[-2:] == ["Tok/s", "Together"]
    assert {row[0].text: (row[-1].text, row[-1].sort) for row in table.rows} == {
        "base (baseline)": ("1", 1), "mid": ("5", 5), "fast": ("2 to 5", 5), "lost": ("\N{EM DASH}", None)
    }  # fmt: skip
    own = frame.set_index("arm")
    assert own.loc[["mid", "fast"], ["members_min", "members_max"]].to_numpy().tolist() == [[5, 5], [2, 5]]
    alone = comparison_table(frame[frame["arm"] == "base"])
    assert alone.header[-1] == "Tok/s" and len(alone.rows[0]) == len(alone.header)


def test_every_form_says_what_the_numbers_are_of(tmp_path, make_run, capsys):
    arms(make_run, tmp_path / "alike", base=(3, 3), mid=(3, 3))
    assert main([str(tmp_path / "alike")]) == 0
    shown, report = capsys.readouterr().out, tmp_path / "alike" / "report"
    assert "Memory is of the whole process" in NOTE
    for text in (shown, (report / "report.md").read_text(), (report / "report.html").read_text()):
        assert NOTE in text and "not comparable" not in text
    assert "share their minutes" in (report / "report.html").read_text()

    arms(make_run, tmp_path / "alone", base=(1, 1), mid=(1, 1))
    assert main([str(tmp_path / "alone")]) == 0
    shown, report = capsys.readouterr().out, tmp_path / "alone" / "report"
    for text in (shown, (report / "report.md").read_text(), (report / "report.html").read_text()):
        assert NOTE not in text and "trained together" not in text.lower()


def drawn(root):
    """Caption, words below, and whether the front is drawn, of the figure of costs, whose one cost is speed."""
    comparison, records = compared(root), read_records(root)
    read = CurveReading(comparison.runs, comparison.arms, "base", records, StepReader()).result()
    with look():
        figures = {name: (caption, figure) for name, _, caption, figure in _figures(comparison, records, read)}
    caption, figure = figures["tradeoffs"]
    ax = figure.axes[-1]
    assert ax.get_title(loc="left") == "Loss against training tokens per second"
    return caption, figure.texts[-1].get_text(), any(line.get_drawstyle() == "steps-post" for line in ax.lines)


def test_speeds_of_other_sizes_in_the_figure(tmp_path, make_run):
    arms(make_run, tmp_path / "unlike", base=(1, 1), mid=(5, 5), fast=(5, 5))
    caption, words, front = drawn(tmp_path / "unlike")
    assert caption.endswith(
        "Speeds are not comparable where the number of runs trained together differs: 1 in base; 5 in mid and fast."
    )
    assert words.endswith("speeds are not comparable, hence no front (runs trained together: 1 to 5).")
    assert not front and "Pareto" not in words

    arms(make_run, tmp_path / "alike", base=(5, 5), mid=(5, 5), fast=(5, 5))
    caption, words, front = drawn(tmp_path / "alike")
    assert front and "Pareto" in words and "comparable" not in caption + words


def test_only_what_is_drawn_counts(tmp_path, make_run):
    """Nothing about speeds in a figure of other costs, nor for arms that are not in it."""
    same = dict.fromkeys(SPEEDS, 30_000.0)
    arms(make_run, tmp_path / "same", same, base=(1, 1), mid=(5, 5))
    make_run(tmp_path / "same", "large", 0, final=1.4, params=7_000_000, tokens_per_second=30_000.0)
    comparison, records = compared(tmp_path / "same"), read_records(tmp_path / "same")
    read = CurveReading(comparison.runs, comparison.arms, "base", records, StepReader()).result()
    with look():
        found = [(caption, figure) for name, _, caption, figure in _figures(comparison, records, read)
                 if name == "tradeoffs"]  # fmt: skip
    ((caption, figure),) = found
    assert "comparable" not in caption + figure.texts[-1].get_text()

    arms(make_run, tmp_path / "some", base=(1, 1), mid=(5, 5), fast=(5, 5))
    comparison = compared(tmp_path / "some")
    assert unlike_speeds(comparison, ["mid", "fast"]) == [] != unlike_speeds(comparison, ["base", "mid"])
    styles = arm_styles(["base", "fast", "mid"], "base", comparison.arms)
    figure = tradeoffs(comparison.runs, "final_val_loss", ["mid", "fast"], styles)
    assert figure is not None and "comparable" not in figure.texts[-1].get_text()


def test_runs_csv_has_the_members(tmp_path, make_run):
    arms(make_run, tmp_path, base=(1, 5))
    assert main([str(tmp_path)]) == 0
    runs = pd.read_csv(tmp_path / "report" / "tables" / "runs.csv")
    assert sorted(runs["members"]) == [1, 5]
