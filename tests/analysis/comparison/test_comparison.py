"""From records to differences, flags and words."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from analysis.comparison.baseline import Baseline, UnknownArm, choose_baseline
from analysis.comparison.compare import compare, difference_frame
from analysis.comparison.flags import matches, seed_words
from analysis.comparison.verdict import verdict
from analysis.records.frames import runs_frame
from analysis.records.runs import read_records
from analysis.tables.comparison import comparison_frame, comparison_table, sizes_table
from analysis.tables.table import latex, markdown

ARM = (1.50, 1.52, 1.48)  # with BASE: the example computed by hand in test_report_statistics
BASE = (1.60, 1.58, 1.60)


def compared(directory, baseline=None, metric="best_val_loss"):
    records = read_records(directory, metric)
    return compare(records, runs_frame(records.runs), choose_baseline(records, baseline, metric), metric), records


def losses(make_run, directory, arm, values, **changes):
    for seed, value in enumerate(values):
        make_run(directory, arm, seed, final=value, **changes)


def said(comparison, arm):
    return next(sentence for sentence in verdict(comparison).sentences if sentence.arm == arm)


def test_differences_are_paired_by_seed(tmp_path, make_run):
    losses(make_run, tmp_path, "gated", ARM)
    losses(make_run, tmp_path, "gain", BASE)
    make_run(tmp_path, "gain", 7, final=99.0)  # no partner: in the mean of gain, in no difference
    comparison, records = compared(tmp_path, "gain")
    row = comparison.difference("gated")
    assert (row["pairs"], row["better_in"]) == (3, 3)
    assert row["difference"] == pytest.approx(-0.28 / 3)
    # of two arms the block model is the paired t test
    assert row["p"] == row["p_adjusted"] == pytest.approx(1 - math.sqrt(28 / 30))
    assert row["p_block"] == row["p_holm"] == pytest.approx(row["p"])
    assert row["shown"] and comparison.arms == ["gated", "gain"]

    frame = comparison_frame(comparison, records).set_index("arm")
    assert frame.loc["gain", "best_val_loss_mean"] == pytest.approx((sum(BASE) + 99) / 4)
    assert frame.loc["gated", "best_val_loss_sd"] == pytest.approx(0.02)
    assert frame.loc["gated", "seeds"] == 3


def test_seeds_are_pairs_of_init_and_data(tmp_path, make_run):
    make_run(tmp_path, "a", 0, seed_data=5, final=1.0)
    make_run(tmp_path, "b", 0, seed_data=6, final=2.0)
    comparison, _ = compared(tmp_path, "a")
    assert comparison.difference("b")["pairs"] == 0
    assert "shares no seed" in said(comparison, "b").text


def test_words_need_evidence(tmp_path, make_run):
    losses(make_run, tmp_path, "base", (1.50, 1.60, 1.55))
    losses(make_run, tmp_path, "better", (1.30, 1.41, 1.36))
    losses(make_run, tmp_path, "worse", (1.80, 1.91, 1.86))
    losses(make_run, tmp_path, "noise", (1.40, 1.70, 1.50))
    comparison, _ = compared(tmp_path, "base")
    kinds = {sentence.arm: sentence.kind for sentence in verdict(comparison).sentences}
    assert kinds == {"better": "better", "worse": "worse", "noise": "none"}
    assert "no difference shown" in said(comparison, "noise").text
    assert "winner" not in str(verdict(comparison)).lower()
    # differences of better: -0.20, -0.19, -0.19, mean -0.58/3, sd sqrt(1/3)/100; t(2) at 97.5% is 4.302653
    assert re.fullmatch(
        r"better beats base by 0\.1933 ± 0\.0143 nats \(3 paired seeds, adjusted p = 0\.\d{3}\); worse is worse "
        r"than base by 0\.3067 ± 0\.0143 nats \(3 paired seeds, adjusted p < 0\.001\); no difference shown between "
        r"noise and base \(these 3 seeds would show a difference of about 0\.\d{4} in four of five sweeps\)\.",
        verdict(comparison).headline,
    )


def test_correction_can_take_a_difference_away(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM)  # p = 0.034 alone
    losses(make_run, tmp_path, "other", (1.60, 1.55, 1.72))
    comparison, _ = compared(tmp_path, "base")
    row = comparison.difference("gated")
    assert row["p_adjusted"] == row["p_block"] > 0.05 > row["p"] and row["high"] < 0
    assert comparison.methods["best_val_loss"].name == "dunnett"
    assert said(comparison, "gated").kind == "none"
    assert "Alone it would count; after correcting for 2 comparisons" in said(comparison, "gated").text


def test_a_difference_needs_its_own_spread_too(tmp_path, make_run):
    """What the pooled residual calls a difference is none while the arm's own paired test does not."""
    steady = {f"steady{i}": [1.50 + 0.01 * i + x for x in (0.0, 0.001 * i, 0.0)] for i in range(5)}
    for arm, values in ({"base": (1.50, 1.50, 1.501)} | steady | {"wild": (1.45, 1.40, 1.50)}).items():
        losses(make_run, tmp_path, arm, values)
    comparison, _ = compared(tmp_path, "base")
    row = comparison.difference("wild")
    assert row["p_block"] < 0.05 < row["p"] == row["p_adjusted"] and not row["shown"]


def test_a_noisy_baseline_is_not_pooled(tmp_path, make_run):
    random = np.random.default_rng(0)
    losses(make_run, tmp_path, "base", 1.5 + 0.1 * random.normal(size=5))
    for arm in "abcd":
        losses(make_run, tmp_path, arm, 1.4 + 0.002 * random.normal(size=5))
    comparison, _ = compared(tmp_path, "base")
    method = comparison.methods["best_val_loss"]
    assert method.name == "holm" and method.p_spread < 0.001
    row = comparison.difference("a")
    assert row["p_adjusted"] == row["p_holm"] >= row["p"]
    assert any("not pooled" in remark and "Holm" in remark for remark in verdict(comparison).remarks)


def test_what_the_seeds_could_show_depends_on_the_arm_where_spreads_are_not_pooled(tmp_path, make_run):
    random = np.random.default_rng(0)
    base = 1.5 + 0.1 * random.normal(size=5)
    losses(make_run, tmp_path, "base", base)
    for arm in "abcd":
        losses(make_run, tmp_path, arm, base.mean() + 0.002 * random.normal(size=5))
    comparison, _ = compared(tmp_path, "base")
    assert comparison.methods["best_val_loss"].name == "holm"
    low, *_, high = sorted(comparison.difference(arm)["smallest_detectable"] for arm in "abcd")
    assert f"of {low:.4f} to {high:.4f}, depending on the arm, in four" in verdict(comparison).headline


def test_arms_without_common_seeds_are_compared_unpaired(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    for seed, value in enumerate(ARM):
        make_run(tmp_path, "gated", seed + 10, final=value)
    comparison, _ = compared(tmp_path, "base")
    row = comparison.difference("gated")
    expected = scipy.stats.ttest_ind(ARM, BASE, equal_var=False)
    assert (row["test"], row["pairs"], row["p_adjusted"]) == ("unpaired", 0, pytest.approx(expected.pvalue))
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert said(comparison, "gated").kind == "better" and "unpaired" in said(comparison, "gated").text
    assert "Welch" in said(comparison, "gated").text


def test_paired_and_unpaired_share_the_error(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM)
    for seed, value in enumerate(ARM):
        make_run(tmp_path, "other", seed + 10, final=value)
    comparison, _ = compared(tmp_path, "base")
    paired, unpaired = comparison.difference("gated"), comparison.difference("other")
    assert paired["p_adjusted"] == pytest.approx(2 * paired["p"])
    assert unpaired["p_adjusted"] == pytest.approx(2 * unpaired["p"])


def test_a_sweep_under_way_says_so(tmp_path, make_run, make_plan):
    make_plan(tmp_path, [("base", 0), ("base", 1), ("gated", 0), ("gated", 1)], baseline="base")
    losses(make_run, tmp_path, "base", (1.5, 1.6))
    make_run(tmp_path, "gated", 0, finished=False)
    found = verdict(compared(tmp_path)[0])
    assert found.cautions == ["Not the last word: 2 planned runs have no result yet."]
    assert found.headline.endswith("No usable run of gated.")


def test_two_seeds_say_how_wide(tmp_path, make_run):
    losses(make_run, tmp_path, "base", (1.5, 1.6))
    losses(make_run, tmp_path, "gated", (1.49, 1.58))
    comparison, _ = compared(tmp_path, "base")
    width = 2 * math.tan(0.475 * math.pi) * 0.005  # sd of -0.01 and -0.02 over sqrt(2)
    assert f"−0.0150 ± {width / 2:.4f} nats" in said(comparison, "gated").text
    assert any("Not shown does not mean equal" in caution for caution in verdict(comparison).cautions)


def test_one_seed_shows_nothing(tmp_path, make_run):
    make_run(tmp_path, "base", 0, final=1.5)
    make_run(tmp_path, "gated", 0, final=1.0)
    comparison, _ = compared(tmp_path, "base")
    assert math.isnan(comparison.difference("gated")["low"]) and not comparison.difference("gated")["shown"]
    assert said(comparison, "gated").kind == "untested" and "no interval" in said(comparison, "gated").text
    assert verdict(comparison).headline.startswith("Nothing can be shown")


def test_one_arm(tmp_path, make_run):
    losses(make_run, tmp_path, "gated", (1.4, 1.6))
    comparison, _ = compared(tmp_path)
    assert verdict(comparison).headline == (
        "One arm only, gated: best validation loss 1.5000 nats per token (sd 0.1414 over 2 seeds). "
        "There is nothing to compare it with."
    )


def test_identical_arms(tmp_path, make_run):
    losses(make_run, tmp_path, "a", (1.5, 1.6))
    losses(make_run, tmp_path, "b", (1.5, 1.6))
    comparison, _ = compared(tmp_path, "a")
    assert "exactly the same loss" in said(comparison, "b").text and said(comparison, "b").kind == "none"


def test_other_data_is_not_compared(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM)
    losses(make_run, tmp_path, "foreign", (0.1, 0.11, 0.12), data__sha256="f" * 64)
    comparison, _ = compared(tmp_path, "base")
    assert said(comparison, "foreign").kind == "incomparable"
    assert "data ffffffffffff instead of dddddddddddd" in said(comparison, "foreign").text
    assert comparison.difference("foreign")["pairs"] == 0
    assert comparison.difference("gated")["family"] == 1  # the other one is no comparison
    chosen_by_mean, _ = compared(tmp_path)
    assert {s.kind for s in verdict(chosen_by_mean).sentences} == {"incomparable"}


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"params": 3_600_000}, "params", "parameters +2.9%"),
        ({"tokens": 999}, "tokens", "training tokens 999 instead of 153,600"),
        ({"environment__code_version": "w" * 12}, "code", "code version wwwwwwwwwwww"),
        ({"environment__device": "cuda"}, "device", "device cuda instead of cpu"),
        (
            {"environment__versions": {"python": "3.11.2", "torch": "2.11.0"}},
            "versions",
            "versions torch 2.11.0 instead of torch 2.13.0",
        ),
        ({"status": "stopped", "stop_reason": "plateau"}, "stopped", "3 of 3 stopped early (plateau)"),
    ],
)
def test_what_is_not_matched_is_said(tmp_path, make_run, changes, kind, words):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM, **changes)
    comparison, _ = compared(tmp_path, "base")
    assert [(flag.arm, flag.kind, flag.blocking) for flag in comparison.flags] == [("gated", kind, False)]
    assert words in said(comparison, "gated").text
    assert said(comparison, "gated").kind == "better"
    assert "The difference may come from that." in said(comparison, "gated").text


def test_small_parameter_differences_pass(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM, params=3_534_000)
    assert compared(tmp_path, "base")[0].flags == []


def test_missing_seeds_and_lost_runs_are_flagged(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM[:2])
    make_run(tmp_path, "gated", 2, status="diverged", best_val_loss=None)
    comparison, records = compared(tmp_path, "base")
    assert [(f.kind, f.text) for f in comparison.flags] == [
        ("seeds", "no usable run with seed 2"),
        ("lost", "1 diverged run"),
    ]
    assert "Not in these numbers: 1 diverged run." in said(comparison, "gated").text
    table = comparison_table(comparison_frame(comparison, records))
    assert [row[2].text for row in table.rows] == ["2 (1 diverged)", "3"]


def test_arms_without_a_usable_run_are_named(tmp_path, make_run, make_plan):
    make_plan(tmp_path, [("base", 0), ("gated", 0), ("never_started", 0)], baseline="base")
    losses(make_run, tmp_path, "base", BASE)
    make_run(tmp_path, "gated", 0, status="diverged", best_val_loss=None)
    comparison, records = compared(tmp_path)
    assert verdict(comparison).headline.endswith("No usable run of gated and never_started.")
    rows = comparison_table(comparison_frame(comparison, records)).rows
    assert [(row[0].text, row[2].text, row[6].text) for row in rows[1:]] == [
        ("gated", "0 (1 diverged)", "—"),
        ("never_started", "0 (1 missing)", "—"),
    ]


def test_matches(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM, params=3_600_000)
    comparison, _ = compared(tmp_path, "base")
    found = {match.what: match for match in matches(comparison.runs, "base")}
    assert {what for what, match in found.items() if not match.same} == {"Parameters"}
    assert found["Seeds"].text == "0, 1, 2"
    assert "2.86% from the baseline" in found["Parameters"].text


def test_choice_of_the_baseline(tmp_path, make_run, make_plan):
    losses(make_run, tmp_path, "gain", BASE)
    losses(make_run, tmp_path, "gated", ARM)
    records = read_records(tmp_path)
    assert choose_baseline(records, None, "best_val_loss") == Baseline("gated", "best_mean")
    make_plan(tmp_path, [("gain", 0), ("gated", 0)], baseline="gain")
    records = read_records(tmp_path)
    assert choose_baseline(records, None, "best_val_loss") == Baseline("gain", "sweep")
    assert choose_baseline(records, "gated", "best_val_loss") == Baseline("gated", "given")
    with pytest.raises(UnknownArm, match="did you mean 'gated'"):
        choose_baseline(records, "gatd", "best_val_loss")
    make_plan(tmp_path, [("gain", 0)], baseline="never_ran")
    chosen = choose_baseline(read_records(tmp_path), None, "best_val_loss")
    assert chosen.source == "best_mean" and "never_ran" in chosen.note


def test_best_mean_is_corrected_over_all_pairs(tmp_path, make_run):
    """An arm that is chosen for its result is not a baseline set beforehand: 3 arms make 3 comparisons, not 2."""
    losses(make_run, tmp_path, "a", ARM)
    losses(make_run, tmp_path, "b", BASE)
    losses(make_run, tmp_path, "c", (1.75, 1.70, 1.65))
    named, _ = compared(tmp_path, "a")
    chosen, _ = compared(tmp_path)
    assert chosen.baseline == Baseline("a", "best_mean")
    assert (named.difference("b")["family"], chosen.difference("b")["family"]) == (2, 3)
    assert chosen.difference("b")["p_block"] > named.difference("b")["p_block"]
    assert (named.methods["best_val_loss"].name, chosen.methods["best_val_loss"].name) == ("dunnett", "tukey")
    assert any("chosen after looking" in remark for remark in verdict(chosen).remarks)


@pytest.mark.parametrize("source", ["given", "best_mean"])
def test_family_wise_error_whatever_the_baseline(source):
    random = np.random.default_rng(5)
    arms, seeds, sweeps, wrong = list("abcde"), 4, 120, 0
    for _ in range(sweeps):
        values = random.normal(size=(5, seeds)) + random.normal(size=seeds)
        baseline = arms[int(values.mean(axis=1).argmin())] if source == "best_mean" else "a"
        runs = pd.DataFrame(
            [(arm, s, s, values[i, s]) for i, arm in enumerate(arms) for s in range(seeds)],
            columns=["arm", "seed_init", "seed_data", "best_val_loss"],
        )
        frame, _ = difference_frame(runs, arms, Baseline(baseline, source), "best_val_loss", set())
        wrong += frame["shown"].any()
    assert wrong / sweeps < 0.05 + 3 * math.sqrt(0.05 * 0.95 / sweeps)


def test_both_metrics_are_compared(tmp_path, make_run):
    for seed, (best, final) in enumerate([(1.50, 1.9), (1.52, 1.4), (1.48, 1.8)]):
        make_run(tmp_path, "gated", seed, best=best, final=final)
    for seed, value in enumerate(BASE):
        make_run(tmp_path, "base", seed, final=value)
    comparison, _ = compared(tmp_path, "base", "final_val_loss")
    assert comparison.arms == ["base", "gated"]
    assert not comparison.difference("gated")["shown"] and comparison.difference("gated", "best_val_loss")["shown"]
    by_best, overfitted = verdict(comparison).cautions[::-1][:2]
    assert by_best.startswith("By best validation loss the verdict is another for some arms (better: gated;")
    # finals 1.9, 1.4, 1.8 (mean 1.7) over bests 1.50, 1.52, 1.48 (mean 1.5)
    assert overfitted.startswith("Overfitted: the final validation loss of gated is 13% above its best.")
    comparison, _ = compared(tmp_path, "base", "best_val_loss")
    assert not any("Overfitted" in caution for caution in verdict(comparison).cautions)


def test_the_table_of_the_specification(tmp_path, make_run):
    losses(make_run, tmp_path, "us", ARM, peak_memory_bytes=512 * 2**20, tokens_per_second=35012.4)
    losses(make_run, tmp_path, "pi|pe", BASE[:1], grad_ratio=None)
    comparison, records = compared(tmp_path, "us")
    lines = markdown(comparison_table(comparison_frame(comparison, records))).splitlines()
    assert lines[0] == (
        "| Model | Params | Seeds | Steps | Final Train Loss | Final Val Loss | Best Val Loss | Bits/byte "
        "| RWKV/Mamba Ratio | Memory | Tok/s |"
    )
    assert lines[2] == (
        "| us (baseline) | 3,500,000 | 3 | 150 | 1.4500 ± 0.0200 | 1.5000 ± 0.0200 | 1.5000 ± 0.0200 | 2.164 ± 0.029 "
        "| 0.80 | 512 MiB | 35,012 |"
    )
    assert lines[3].startswith("| pi\\|pe | 3,500,000 | 1 | 150 | 1.5500 | 1.6000 | 1.6000 | 2.308 | — |")


def test_seed_words():
    assert seed_words([(1, 1), (0, 0)]) == "seeds 0, 1"
    assert seed_words([(0, 1)]) == "seed 0/1 (init/data)"


def test_the_dtype_of_the_configuration_is_compared(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM)
    for folder in tmp_path.iterdir():
        dtype = "bfloat16" if folder.name.startswith("gated") else "float32"
        (folder / "config.yaml").write_text(f"optim:\n  dtype: no\ntrainer:\n  max_steps: 150\n  dtype: {dtype}\n")
    comparison, _ = compared(tmp_path, "base")
    assert [(f.arm, f.text) for f in comparison.flags] == [("gated", "dtype bfloat16 instead of float32")]


def test_gates_are_counted(tmp_path, make_run):
    gates = {"G0": {"verdict": "pass"}, "G1": {"verdict": "warn"}, "G2": {"verdict": "fail"}, "G3": {"verdict": None}}
    losses(make_run, tmp_path, "us_50%", ARM, gates=gates)
    losses(make_run, tmp_path, "base", BASE)
    comparison, records = compared(tmp_path, "base")
    table = sizes_table(comparison_frame(comparison, records))
    assert table.header[-1] == "Gates passed"
    assert [row[-1].text for row in table.rows] == ["3 of 9 (3 warned)", "—"]
    text = latex(table)
    assert r"us\_50\%" in text and text.count(r"\\") == 3 and "us_" not in text


def test_of_many_arms_those_with_a_difference_are_told(tmp_path, make_run):
    random = np.random.default_rng(6)
    shifts = {"base": 0.0, "a": -0.3, "b": -0.2} | {f"n{i}": 0.0 for i in range(8)}
    for arm, shift in shifts.items():
        losses(make_run, tmp_path, arm, 1.5 + shift + 0.01 * random.normal(size=4))
    found = verdict(compared(tmp_path, "base")[0])
    assert {sentence.arm for sentence in found.told} == {"a", "b"} and len(found.sentences) == 10
    assert re.match(
        r"a and b beat base by 0\.\d{4} ± 0\.\d{4} and 0\.\d{4} ± 0\.\d{4} nats \(4 paired seeds, adj", found.headline
    )


def test_what_is_not_matched_is_a_caution(tmp_path, make_run):
    losses(make_run, tmp_path, "base", BASE)
    losses(make_run, tmp_path, "gated", ARM, tokens=1, params=9_000_000)
    found = verdict(compared(tmp_path, "base")[0])
    assert found.cautions == ["Not matched between the arms: tokens per run, parameters."]
    assert "The difference may come from that" in found.sentences[0].text


def test_runs_of_one_arm_of_other_sizes_are_flagged(tmp_path, make_run):
    for seed, params in enumerate((3_500_000, 3_510_000, 3_600_000)):  # 0.3% and 2.9% above the first
        make_run(tmp_path / "near", "gated", seed, params=min(params, 3_510_000))
        make_run(tmp_path / "far", "gated", seed, params=params)
    assert compared(tmp_path / "near")[0].flags == []
    (flag,) = compared(tmp_path / "far")[0].flags
    assert flag.text == "its own runs differ in parameters: 3,500,000, 3,510,000, 3,600,000"
