"""Trials of a search: what is tried, what pruners are told, and trials that come to nothing."""

from __future__ import annotations

import itertools
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from hybrid.schema import Config
from sweeps.outcome import fresh_seeds
from tests.runs import Setting, cli, finish, start, strict_json
from tests.sweeps.searches import EVALUATED, LR, SEARCH, evaluations_of, record_of, trials_of, without_lr

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what pruners are told


RISING = [  # the loss, from some step on, looked at after every step
    "optim.lr=interval(0.5,0.9)", "optim.grad_clip=0.0", "schedule.warmup_steps=1", "trainer.eval_every=1",
    "sweep.search.n_trials=1",
]  # fmt: skip


def rising(small: Setting, *more: str) -> list[str]:
    set_there = ("optim.", "schedule.", "trainer.eval_every")
    return [*(line for line in small.with_() if not line.startswith(set_there)), *RISING, *more]


def test_seeds_to_confirm_with_had_no_part() -> None:
    for init, data in ((0, 0), (2, 4), (9, 9)):
        seeds = fresh_seeds(Config(seed_init=init, seed_data=data))
        assert len(set(seeds)) == 5 and not {init, data} & set(seeds)


def test_a_pruner_judges_what_the_search_looks_for(small: Setting) -> None:
    """Of the best loss the best so far, where the loss rises again; of the final one the loss itself."""
    for metric in ("best_val_loss", "final_val_loss"):
        command = rising(small, "pruner=median", f"sweep.name={metric}", f"sweep.search.metric={metric}")
        assert cli(command, "-m").code == 0
        (trial,) = trials_of(small.out / metric)
        losses = list(evaluations_of(small.out / metric, trial).values())
        told = list(trial["intermediate"].values())
        assert losses != sorted(losses, reverse=True)  # it rises
        assert told == (list(itertools.accumulate(losses, min)) if metric == "best_val_loss" else losses)


def test_a_patient_pruner_sees_the_losses_themselves(small: Setting) -> None:
    """It waits for them to fall, which a best so far never stops doing."""
    patient = ["pruner=patient", "sweep.search.pruner.wrapped_pruner=null", "sweep.search.pruner.patience=1"]
    assert cli(rising(small, *patient, "sweep.name=p"), "-m").code == 0
    (trial,) = trials_of(small.out / "p")
    assert trial["state"] == "PRUNED" and list(trial["intermediate"].values()) != sorted(trial["intermediate"].values())


def test_others_are_held_against_known_points(small: Setting) -> None:
    """A known point has its place on the rungs of successive halving."""
    known = "sweep.search.enqueue=[{optim.lr: 1.0e-9},{optim.lr: 1.0e-2}]"
    rungs = ["pruner=sha", *EVALUATED, "sweep.search.pruner.min_resource=3", "sweep.search.pruner.reduction_factor=2"]
    lines = without_lr(small, "sweep.name=k", "optim.lr=interval(1e-9,1e-2)", "sweep.search.n_trials=2", known, *rungs)
    assert cli(lines, "-m").code == 0
    assert [trial["state"] for trial in trials_of(small.out / "k")] == ["COMPLETE"] * 2
    storage = JournalStorage(JournalFileBackend(str(small.out / "k" / "study.journal")))
    for trial in optuna.load_study(study_name=None, storage=storage).trials:
        assert trial.system_attrs["completed_rung_0"] == trial.intermediate_values[3]


# ---- trials that come to nothing


def test_a_diverging_trial_is_no_end_and_no_failure(small: Setting) -> None:
    known = "sweep.search.enqueue=[{optim.lr: 1.0e9},{optim.lr: 1.0e-3}]"
    line = "optim.lr=tag(log,interval(1e-3,1e10))"
    answer = cli(without_lr(small, line, "sweep.name=d", "sweep.search.n_trials=2", "pruner=none", known), "-m")
    assert (answer.code, answer.err) == (0, "")
    bad, good = trials_of(small.out / "d")
    assert bad["state"] == "FAIL" and bad["reason"].startswith("diverged: training loss not finite") and bad["enqueued"]
    assert good["state"] == "COMPLETE" and good["params"] == {"optim.lr": 1e-3}
    assert f"trial 0 failed: {bad['reason']} (log: {small.out}/d/{bad['folder']}/log.txt)" in answer.out


def test_a_raising_trial_is_counted_and_tried_again_on_request(small: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.training.loop import Trainer

    original = Trainer._update

    def update(self: Trainer, step: int) -> Any:
        if step == 2 and self.cfg.fusion.name == "gated":
            raise RuntimeError("no luck today")
        return original(self, step)

    monkeypatch.setattr(Trainer, "_update", update)
    known = "sweep.search.enqueue=[{fusion: gated},{fusion: gain}]"
    command = without_lr(
        small, "fusion=choice(gain,gated)", "sweep.name=r", "sweep.search.n_trials=2", "pruner=none", known
    )
    answer = cli(command, "-m")
    assert answer.code == 1 and answer.err == "error: trials of the search: 1 failed\n"
    failed, fine = trials_of(small.out / "r")
    assert (failed["state"], failed["reason"]) == ("FAIL", "failed: RuntimeError: no luck today")
    assert fine["state"] == "COMPLETE" and "retry_failed=true" in answer.out
    monkeypatch.undo()
    assert cli(command, "-m").code == 1  # nothing is tried again unasked
    answer = cli([*command, "sweeps.retry_failed=true"], "-m")
    assert answer.code == 0
    fine_again, once_more = trials_of(small.out / "r")
    assert fine_again == fine and once_more["state"] == "COMPLETE" and once_more["params"] == failed["params"]
    assert once_more["folder"] == failed["folder"]


def test_a_combination_that_is_no_configuration_fails_alone(small: Setting) -> None:
    """Both ends of both ranges are fine, one of their combinations is not."""
    lines = ["model.d_model=choice(32,48)", "model.rwkv.num_heads=choice(2,3)"]
    known = "sweep.search.enqueue=[{model.d_model: 32, model.rwkv.num_heads: 3}]"
    rest = [line for line in small.with_() if not line.startswith(("model.d_model", "model.rwkv.num_heads"))]
    answer = cli([*rest, *lines, known, "sweep.name=c", "sweep.search.n_trials=1"], "-m")
    assert answer.code == 0 and "trial 0 failed: model.rwkv.expand_k" in answer.out
    assert trials_of(small.out / "c")[0]["state"] == "FAIL"


def test_a_known_baseline_runs_to_its_end(small: Setting) -> None:
    """Whatever the pruner thinks of it: others are compared with it."""
    strict = ["pruner=median", "sweep.search.pruner.n_startup_trials=0", "sweep.search.pruner.n_warmup_steps=0"]
    known = "sweep.search.enqueue=[{optim.lr: 1.0e-2},{optim.lr: 1.0e-5}]"
    assert (
        cli(without_lr(small, LR, "sweep.name=k", "sweep.search.n_trials=2", *EVALUATED, *strict, known), "-m").code
        == 0
    )
    good, bad = trials_of(small.out / "k")
    assert (good["state"], bad["state"]) == ("COMPLETE", "COMPLETE") and bad["values"] > good["values"]


# ---- several


def test_each_arm_has_a_study(small: Setting) -> None:
    answer = cli(without_lr(small, "fusion=gain,gated", LR, "sweep.name=a", "sweep.search.n_trials=2"), "-m")
    assert (answer.code, answer.err) == (0, "") and "a search of 2 studies, 4 trials" in answer.out
    for arm in ("gain", "gated"):
        found = strict_json((small.out / "a" / f"search-{arm}.json").read_text())
        assert (found["arm"], found["study_name"]) == (arm, f"a-{arm}")
        for trial in found["trials"]:
            assert trial["folder"].startswith(f"{arm}-trial-00")
            assert record_of(small.out / "a", trial)["variant"] == f"{arm}-trial-{trial['number']:03d}"
        defaults = yaml.safe_load((small.out / "a" / f"best-{arm}.yaml").read_text())["defaults"]
        assert {"override fusion": arm} in defaults


def test_what_is_searched_need_not_fit_the_defaults(small: Setting) -> None:
    """2,000 steps of warm-up do not go into 12, and fusion=gated, the default, has no proj_init."""
    rest = [line for line in small.with_() if not line.startswith("schedule.warmup_steps")]
    known = "sweep.search.enqueue=[{schedule.warmup_steps: 5, optim.eps: 1.0e-3}]"
    lines = ["fusion=concat,residual", "fusion.proj_init=random", "schedule.warmup_steps=range(2,8)",
             "sweep.name=w", "sweep.search.n_trials=1", known, "optim.eps=1e-4"]  # fmt: skip
    answer = cli([*rest, *lines], "-m")
    assert answer.code == 2 and "optim.eps is no dimension" in answer.err
    answer = cli([*rest, *lines[:-1], "optim.eps=interval(1e-4,1e-2)"], "-m")
    assert (answer.code, answer.err) == (0, "")
    (trial,) = trials_of(small.out / "w", "-residual")
    assert trial["params"] == {"schedule.warmup_steps": 5, "optim.eps": 1e-3} and trial["state"] == "COMPLETE"
    config = yaml.safe_load((small.out / "w" / trial["folder"] / "config.yaml").read_text())
    assert (config["fusion"]["proj_init"], config["schedule"]["warmup_steps"]) == ("random", 5)
    overrides = record_of(small.out / "w", trial)["overrides"]
    assert [line for line in overrides if line.startswith(("schedule", "sweep"))] == ["schedule.warmup_steps=5"]


def test_a_known_baseline_has_no_part_in_what_is_not_searched_any_more(small: Setting) -> None:
    lines = ["sweep=lr_ratio_search", "data=text", "model.target_params=null", "optim.mamba_lr_mult=2",
             "sweep.search.n_trials=1", "pruner=none", "trainer.eval_batch_size=8"]  # fmt: skip
    rest = [line for line in small.with_() if not line.startswith("optim.lr")]
    assert cli([*rest, *lines], "-m").code == 0
    (trial,) = trials_of(small.out / "lr_ratio_search")
    assert trial["params"] == {"optim.lr": 1e-3, "optim.rwkv_lr_mult": 1.0, "fusion.gate_init": 0.5}


def test_what_the_command_sets_beside_a_search_of_it_is_refused(small: Setting) -> None:
    lines = ["optim.eps=1e-8", "optim.eps=interval(1e-6,1e-3)", "sweep.search.n_trials=1"]
    answer = cli([*small.with_(), *lines], "-m")
    assert answer.code == 2 and "optim.eps is both set and searched; leave one out" in answer.err


def test_what_an_arm_sets_is_not_searched_for_it(small: Setting) -> None:
    arms = ['+sweep.arms.free=["fusion=gain"]', '+sweep.arms.held=["fusion=gain","optim.eps=1.0e-3"]']
    known = "sweep.search.enqueue=[{schedule.warmup_steps: 5, optim.eps: 1.0e-4}]"
    lines = [*arms, "optim.eps=interval(1e-4,1e-2)", "sweep.name=h", "sweep.search.n_trials=1"]
    rest = [line for line in small.with_() if not line.startswith("schedule.warmup_steps")]
    answer = cli([*rest, *lines, known, "schedule.warmup_steps=range(2,8)"], "-m")
    assert (answer.code, answer.err) == (0, "")
    (free,), (held,) = (trials_of(small.out / "h", f"-{arm}") for arm in ("free", "held"))
    assert free["params"] == {"schedule.warmup_steps": 5, "optim.eps": 1e-4}
    assert held["params"] == {"schedule.warmup_steps": 5}
    assert yaml.safe_load((small.out / "h" / held["folder"] / "config.yaml").read_text())["optim"]["eps"] == 1e-3
    assert yaml.safe_load((small.out / "h" / "best-held.yaml").read_text())["optim"]["eps"] == 1e-3
    answer = cli([*small.with_(), *lines, "sweep.name=i"], "-m")
    assert answer.code == 2 and "arm held sets all that is searched (optim.eps); leave one out" in answer.err


def test_two_objectives(small: Setting) -> None:
    objectives = ["sweep.search.metric=[best_val_loss,flops_per_token]", "sweep.search.direction=[minimize,minimize]"]
    line = "model.ffn_hidden=range(8,64,8)"
    command = small.with_(line, "sweep.name=m", "sweep.search.n_trials=4", "sampler=nsga2", *objectives)
    assert "add pruner=none" in cli(command, "-m").err
    answer = cli([*command, "pruner=none"], "-m")
    assert (answer.code, answer.err) == (0, "")
    found = strict_json((small.out / "m" / "search.json").read_text())
    values = {trial["number"]: trial["values"] for trial in found["trials"]}
    front = [n for n, v in values.items() if not any(w != v and all(a <= b for a, b in zip(w, v, strict=True))
                                                     for w in values.values())]  # fmt: skip
    assert found["best"] == front and all(len(v) == 2 for v in values.values())


def test_the_same_point_twice_is_one_run(small: Setting) -> None:
    """A space of two points and three trials: the third finds a record and takes its curve over."""
    answer = cli(
        small.with_("fusion=choice(gain,gated)", "sweep.name=p", "sweep.search.n_trials=3", "pruner=none"), "-m"
    )
    assert answer.code == 0
    trials = trials_of(small.out / "p")
    assert len(trials) == 3 and len(list((small.out / "p").glob("*/summary.json"))) == 2
    by_point: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_point.setdefault(trial["params"]["fusion"], []).append(trial)
    (one, other), _ = sorted(by_point.values(), key=len, reverse=True)
    assert (one["folder"], one["values"], one["intermediate"]) == (
        other["folder"],
        other["values"],
        other["intermediate"],
    )


@pytest.mark.slow  # test_study.py has many workers at once on one study
def test_two_searches_at_once_share_the_study(small: Setting) -> None:
    command = without_lr(small, *SEARCH, "pruner=none", "sweep.search.n_trials=8")
    processes = [start(command, "-m") for _ in range(2)]
    answers = [finish(process) for process in processes]
    assert [answer.code for answer in answers] == [0, 0]
    trials = trials_of(small.out / "s")
    assert [trial["number"] for trial in trials] == list(range(8)) and {t["state"] for t in trials} == {"COMPLETE"}
    assert len({trial["folder"] for trial in trials}) == 8 and len({trial["worker"] for trial in trials}) == 2
