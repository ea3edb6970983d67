"""Searches: what is read from search.json, the answer in words, tables and figures; trials are never arms."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from analysis.records.runs import read_records
from analysis.report import main, write_report
from analysis.search.tables import top_trials
from analysis.search.trials import Dimension, read_search
from analysis.search.words import answer
from tests.analysis.search.search_files import trial, write_search, write_trial_runs


@pytest.fixture
def trials():
    """Trial 3 is best; 0 was put in by hand; 1 was pruned, 2 failed, 5 still runs."""
    return [
        trial(0, 3e-4, 1.9, enqueued=True),
        trial(1, 1e-3, None, state="PRUNED", steps=50),
        trial(2, 9e-3, None, reason="training loss not finite at step 7"),
        trial(3, 9.5e-3, 1.7, params={"optim.lr": 9.5e-3, "fusion": "gated", "fusion.gate_init": 0.5}),
        trial(4, 2e-3, 1.8),
        trial(5, 2e-3, None, state="RUNNING"),
    ]


def read(folder, name="search.json"):
    return read_search(folder / name, folder)


def said(folder):
    found = answer(read(folder), "outputs/lr")
    return found.headline, dict(found.points)


def test_answer(tmp_path, trials):
    write_search(tmp_path, trials, n_trials=8)
    headline, points = said(tmp_path)
    assert headline == "lr: the best of 6 trials is trial 3, with best validation loss 1.7000."
    assert points["found"] == "Trial 3: optim.lr=0.0095, fusion=gated, fusion.gate_init=0.5."
    assert points["baseline"] == (  # 1.9 - 1.7
        "0.2000 better than the known configuration, trial 0 (optim.lr=0.0003, fusion=gain), which has 1.9000."
    )
    assert points["edge"].startswith("The best value of optim.lr, 0.0095, is at the upper end of its range (0.01)")
    assert "one seed" in points["evidence"] and "no evidence yet" in points["evidence"]
    assert points["counts"] == (  # 8 planned, 5 ended; 600 of 1,000 steps
        "3 complete, 1 pruned, 1 failed, 3 not ended of 8 trials (TPESampler, HyperbandPruner). "
        "Pruning saved 40% of the steps (600 instead of 1,000)."
    )


def test_how_to_confirm_names_the_file_that_is_there(tmp_path, trials):
    write_search(tmp_path, trials)
    assert "--config-name" not in said(tmp_path)[1]["evidence"]
    (tmp_path / "best.yaml").write_text("")
    command = "python -m hybrid.train -m --config-dir outputs/lr --config-name best 'sweep.seeds="
    assert f"{command}[...]'" in said(tmp_path)[1]["evidence"]  # a record of before they were recorded
    write_search(tmp_path, trials, fresh_seeds=[0, 1, 2, 4, 5])
    assert f"{command}[0,1,2,4,5]'" in said(tmp_path)[1]["evidence"]


def test_best_known_configuration(tmp_path):
    write_search(tmp_path, [trial(0, 1e-3, 1.5, enqueued=True), trial(1, 2e-3, 1.6)])
    _, points = said(tmp_path)
    assert points["baseline"].startswith("No trial was better than the known configuration, trial 0")
    assert "edge" not in points


def test_nothing_complete(tmp_path):
    write_search(tmp_path, [trial(0, 1e-3, None), trial(1, 2e-3, None, state="RUNNING")])
    headline, points = said(tmp_path)
    assert headline == "No trial of lr is complete yet." and list(points) == ["counts"]
    assert main([str(tmp_path)]) == 0


def test_a_range_that_ends_at_zero_cannot_be_widened_below(tmp_path):
    space = {"warmup": {"type": "int", "low": 0, "high": 100}, "lr": {"type": "float", "low": 0.1, "high": 1.0}}
    write_search(tmp_path, [trial(0, 1e-3, 1.5, params={"warmup": 0, "lr": 0.1})], space=space)
    assert "lr, 0.1, is at the lower end" in said(tmp_path)[1]["edge"]
    write_search(tmp_path, [trial(0, 1e-3, 1.5, params={"warmup": 0, "lr": 0.5})], space=space)
    assert "edge" not in said(tmp_path)[1]


def test_position_in_a_range():
    log = Dimension("lr", "float", 1e-4, 1e-2, log=True)
    assert log.position(1e-3) == pytest.approx(0.5)
    assert Dimension("x", "float", 0.0, 4.0).position(1.0) == pytest.approx(0.25)
    assert [log.edge(value) for value in (1.2e-4, 1.4e-4, 1e-3, 9e-3)] == ["lower", None, None, "upper"]
    assert Dimension("f", "categorical", choices=("a",)).edge("a") is None
    assert math.isnan(Dimension("x", "int", 3, 3).position(3))


def test_two_metrics(tmp_path, capsys):
    """By hand: (1.5, 100) and (1.6, 200) stand; (1.7, 150) loses to the second, (1.5, 90) to the first."""
    values = [[1.5, 100.0], [1.6, 200.0], [1.7, 150.0], [1.5, 90.0]]
    found = [trial(i, 1e-3, value) for i, value in enumerate(values)]
    both = {"metrics": ["best_val_loss", "tokens_per_second"], "directions": ["minimize", "maximize"]}
    write_search(tmp_path, found, **both)
    assert sorted(t.number for t in read(tmp_path).best()) == [0, 1]
    assert "2 trials stand on the Pareto front" in said(tmp_path)[0]
    paths = write_report(tmp_path)
    assert "search_pareto.png" in paths.figures
    frame = pd.read_csv(paths.tables["trials.csv"])
    assert frame.loc[frame["best"], "trial"].tolist() == [0, 1]


def test_maximised_metric(tmp_path):
    write_search(
        tmp_path, [trial(0, 1e-3, 10.0), trial(1, 1e-3, 20.0)], metrics=["tokens_per_second"], directions=["maximize"]
    )
    assert [t.number for t in read(tmp_path).best()] == [1]


def test_table_of_the_best_trials(tmp_path, trials):
    write_search(tmp_path, trials)
    table, chosen = top_trials(read(tmp_path), most=1)
    assert [t.number for t in chosen] == [3, 0]  # the known configuration is always there
    assert table.header == [
        "Trial", "Best validation loss", "optim.lr", "fusion", "fusion.gate_init", "Steps", "Minutes"
    ]  # fmt: skip
    assert [cell.text for cell in table.rows[0]] == ["3 (best)", "1.7000", "0.0095", "gated", "0.5", "150", "1.5"]
    assert [cell.text for cell in table.rows[1]] == ["0 (known)", "1.9000", "0.0003", "gain", "—", "150", "1.5"]


def test_report_of_a_search(tmp_path, trials, make_run, capsys):
    root = tmp_path / "lr"
    write_search(root, trials)
    write_trial_runs(make_run, root, trials)
    paths = write_report(root)
    assert paths.report.compared is None and paths.report.records.left_out == []
    assert len(paths.report.records.trials) == 6
    assert set(paths.figures) == {
        f"search_{name}.{kind}" for name in ("history", "importance", "slices") for kind in ("png", "svg")
    }
    frame = pd.read_csv(paths.tables["trials.csv"])
    assert frame["state"].tolist() == ["complete", "pruned", "fail", "complete", "complete", "running"]
    assert frame["place"].tolist()[3:5] == [1, 2]
    assert "\\toprule" in (paths.folder / "tables" / "top_trials.tex").read_text()
    page = paths.html.read_text()
    assert page.index("the best of 6 trials is trial 3") < page.index("Contents")
    assert 'href="../trial-003-00000003/"' in page
    assert main([str(root)]) == 0
    assert "0.2000 better than the known configuration" in capsys.readouterr().out


def test_trials_beside_a_sweep_are_no_arms(tmp_path, trials, make_run):
    write_search(tmp_path / "lr", trials)
    write_trial_runs(make_run, tmp_path / "lr", trials)
    for arm in ("gain", "gated"):
        make_run(tmp_path / "smoke", arm, 0)
    paths = write_report(tmp_path)
    assert paths.report.compared.comparison.arms == ["gain", "gated"]
    assert paths.report.records.left_out == []
    assert "search_history.png" in paths.figures and "final_loss.png" in paths.figures


def test_a_study_per_arm(tmp_path, trials):
    write_search(tmp_path, trials, "search-gain.json", arm="gain")
    write_search(tmp_path, [trial(0, 1e-3, 1.6)], "search-gated.json", arm="gated")
    paths = write_report(tmp_path)
    assert paths.report.headline == (
        "Best validation loss of each of 2 searches: gain 1.7000 (trial 3), gated 1.6000 (trial 0)."
    )
    assert {"trials-1-gain.csv", "trials-2-gated.csv"} <= set(paths.tables)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ('{"schema": "other/1"}', "other/1"),
        ('{"schema": "groundthink.search/1", "metrics": [], "directions": []}', "no usable metrics"),
    ],
)
def test_a_broken_search_file(tmp_path, trials, make_run, content, words, capsys):
    (tmp_path / "search.json").write_text(content)
    assert words in read(tmp_path)
    write_trial_runs(make_run, tmp_path, trials)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "5 trials of a search" in error and words in error


def test_unusable_trials(tmp_path):
    bad = [
        trial(0, 1e-3, 1.5),
        trial(1, 1e-3, None, state="COMPLETE", values=["x"]),
        trial(2, 1e-3, None, state="DREAMING"),
        {"number": "3"},
        trial(4, 1e-3, None, state="PRUNED", intermediate={"x": 1.0, "10": None, "20": 1.2}, params=None),
    ]
    write_search(tmp_path, bad, importance=None, space="none", steps=3)
    found = read(tmp_path)
    assert [(t.number, t.state) for t in found.trials] == [(0, "COMPLETE"), (1, "FAIL"), (4, "PRUNED")]
    assert found.trials[2].intermediate == {20: 1.2}
    assert main([str(tmp_path)]) == 0


def test_baseline_of_a_search_is_refused(tmp_path, trials, capsys):
    write_search(tmp_path, trials)
    assert main([str(tmp_path), "--baseline", "gain"]) == 2
    assert "trials of searches, which are no arms" in capsys.readouterr().err


def test_a_name_cannot_leave_the_folder(tmp_path, trials):
    """Names come from files that somebody else may have written."""
    trials[3]["folder"] = "../../etc"
    write_search(tmp_path / "lr", trials, arm="<b>&../x", study_name="<script>")
    paths = write_report(tmp_path / "lr")
    text = paths.html.read_text()
    assert "<b>&amp;" not in text and "&lt;b&gt;" in text and "etc/" not in text
    assert all(path.resolve().is_relative_to(paths.folder.resolve()) for path in paths.tables.values())


def test_trials_without_their_search_are_not_lost_arms(tmp_path, trials, make_run):
    write_trial_runs(make_run, tmp_path, trials[:4])
    for arm in ("gain", "gated"):
        make_run(tmp_path, arm, 0)
    records = read_records(tmp_path)
    assert records.arms == ["gain", "gated"] and records.left_out == []
    assert json.loads((tmp_path / "trial-000-00000000" / "summary.json").read_text())["trial"]["number"] == 0
