"""From a sweep's description and the command line to its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from hybrid.config import CONF_DIR, ConfigError
from hybrid.schema import SweepConfig
from sweeps.expand import Job, expand, hydra_value, label
from sweeps.space import Space


def names(jobs: list[Job]) -> list[str | None]:
    return [job.variant for job in jobs]


def overrides(jobs: list[Job]) -> list[tuple[str, ...]]:
    return [job.overrides for job in jobs]


# ---- axes of the command line


def test_no_axis_is_one_job() -> None:
    assert expand(SweepConfig(), []) == [Job(None, ())]
    assert expand(SweepConfig(), ["fusion=gain", "seed_init=3"]) == [Job(None, ("fusion=gain", "seed_init=3"))]


def test_all_combinations_in_the_order_of_the_axes() -> None:
    jobs = expand(SweepConfig(), ["optim.lr=1e-3,1e-4", "model=tiny", "fusion=gain,gated"])
    assert names(jobs) == ["lr=0.001-gain", "lr=0.001-gated", "lr=0.0001-gain", "lr=0.0001-gated"]
    assert overrides(jobs)[1] == ("model=tiny", "optim.lr=0.001", "fusion=gated")


def test_seeds_on_the_command_line_name_no_arm_and_move_on_their_own() -> None:
    jobs = expand(SweepConfig(), ["fusion=gain,gated", "seed_init=0,1"])
    assert names(jobs) == ["gain", "gain", "gated", "gated"]
    assert overrides(jobs)[1] == ("fusion=gain", "seed_init=1")
    both = expand(SweepConfig(), ["seed_init=0,1", "seed_data=5,6"])
    assert names(both) == [None] * 4
    assert overrides(both)[2] == ("seed_init=1", "seed_data=5")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("seed_init=range(0,3)", ["seed_init=0", "seed_init=1", "seed_init=2"]),
        ("fusion=choice(gain,gated)", ["fusion=gain", "fusion=gated"]),
        ("fusion.gain_init=[0.5,0.5],[0.7,0.3]", ["fusion.gain_init=[0.5,0.5]", "fusion.gain_init=[0.7,0.3]"]),
        ("data.works=[hamlet],[hamlet,macbeth]", ["data.works=[hamlet]", "data.works=[hamlet,macbeth]"]),
        ("model.target_params=3.5M,null", ["model.target_params=3.5M", "model.target_params=null"]),
        ("trainer.compile=true,false", ["trainer.compile=true", "trainer.compile=false"]),
    ],
)
def test_values_of_an_axis(argument: str, expected: list[str]) -> None:
    jobs = expand(SweepConfig(), [argument])
    assert [tuple(line.lower() for line in job.overrides) for job in jobs] == [(line.lower(),) for line in expected]


@pytest.mark.parametrize(
    "argument", ["data.works=[hamlet,macbeth]", "variant='a,b'", "data.path='/a b/c,d.txt'", "~blocks"]
)
def test_what_is_one_value_stays_as_it_was_typed(argument: str) -> None:
    assert expand(SweepConfig(), [argument]) == [Job(None, (argument,))]


def test_quoted_values_of_an_axis_keep_their_quotes() -> None:
    jobs = expand(SweepConfig(), ["model.pattern='P*2','R M*21 R'"])
    values = [OverridesParser.create().parse_override(job.overrides[0]).value() for job in jobs]
    assert values == ["P*2", "R M*21 R"]
    assert len(set(names(jobs))) == 2


def test_lists_give_arms_different_names() -> None:
    jobs = expand(SweepConfig(), ["fusion.gain_init=[0.5,0.5],[0.7,0.3],[0.3,0.7]"])
    assert len(set(names(jobs))) == 3


def test_arms_of_many_axes_have_different_names() -> None:
    jobs = expand(
        SweepConfig(),
        ["model.rwkv.shift_low_rank=16,32", "model.rwkv.decay_low_rank=32,64", "optim.weight_decay=0.1,0.0",
         "optim.rwkv_lr_mult=1.0,0.5", "optim.mamba_lr_mult=1.0,0.5"],
    )  # fmt: skip
    assert len(jobs) == 32 and len(set(names(jobs))) == 32


def test_arms_of_similar_names_have_different_names() -> None:
    assert len(set(names(expand(SweepConfig(arms={"a b": ["fusion=gain"], "a_b": ["fusion=gated"]}), [])))) == 2


def test_all_choices_of_an_axis() -> None:
    assert len(expand(SweepConfig(), ["init=glob(*)"])) == 2


# ---- a named sweep

NAMED = SweepConfig(name="named", grid={"fusion": ["gain", "gated"], "optim.lr": [0.001, 3e-4]}, seeds=[0, 1, 2])


def test_grid_times_seeds() -> None:
    jobs = expand(NAMED, ["model=tiny"])
    assert len(jobs) == 2 * 2 * 3
    assert names(jobs)[:4] == ["gain-lr=0.001"] * 3 + ["gain-lr=0.0003"]
    assert jobs[1].overrides == ("model=tiny", "fusion=gain", "optim.lr=0.001", "seed_init=1", "seed_data=1")
    assert len(set(overrides(jobs))) == 12


def test_every_arm_has_the_same_seeds() -> None:
    by_arm: dict[str | None, list[str]] = {}
    for job in expand(SweepConfig(name="x", arms={"a": ["fusion=gain"], "b": ["init=fla"]}, seeds=[3, 5]), []):
        by_arm.setdefault(job.variant, []).extend(line for line in job.overrides if line.startswith("seed"))
    assert by_arm == {arm: ["seed_init=3", "seed_data=3", "seed_init=5", "seed_data=5"] for arm in "ab"}


def test_arms_times_grid_times_command_line_times_seeds() -> None:
    sweep = SweepConfig(name="x", arms={"a": ["fusion=gain"], "b": []}, grid={"init": ["official", "fla"]}, seeds=[0])
    jobs = expand(sweep, ["fusion.branch_norm=none,rms"])
    assert len(jobs) == 8
    assert jobs[1] == Job(
        "a-official-branch_norm=rms",
        ("fusion=gain", "init=official", "fusion.branch_norm=rms", "seed_init=0", "seed_data=0"),
    )
    assert names(jobs)[-1] == "b-fla-branch_norm=rms"


def test_an_axis_of_the_command_line_replaces_the_grids() -> None:
    jobs = expand(NAMED, ["fusion=concat,residual,weighted"])
    assert len(jobs) == 3 * 2 * 3 and names(jobs)[0] == "concat-lr=0.001"
    assert not any("gain" in line for job in jobs for line in job.overrides)


def test_one_value_on_the_command_line_pins_the_grids_axis() -> None:
    jobs = expand(NAMED, ["fusion=concat"])
    assert len(jobs) == 2 * 3 and names(jobs)[0] == "concat-lr=0.001"
    assert all(job.overrides[0] == "fusion=concat" for job in jobs)


@pytest.mark.parametrize("key", ["seed_init", "seed_data"])
def test_seeds_of_the_command_line_replace_the_sweeps(key: str) -> None:
    jobs = expand(NAMED, [f"{key}=7,8"])
    assert len(jobs) == 4 * 2
    assert {line for job in jobs for line in job.overrides if line.startswith("seed")} == {f"{key}=7", f"{key}=8"}
    pinned = expand(NAMED, [f"{key}=7"])
    assert len(pinned) == 4
    assert {line for job in pinned for line in job.overrides if line.startswith("seed")} == {f"{key}=7"}


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["fusion=gain"], "fusion"),
        (["fusion=gain,concat"], "fusion"),
        (["++fusion=gain"], "fusion"),
        (["optim.lr=1"], "optim.lr"),
        pytest.param(
            ["+optim.lr=1,2"],
            "optim.lr",
        ),
    ],
)
def test_what_makes_the_arms_differ_cannot_be_overwritten(arguments: list[str], key: str) -> None:
    sweep = SweepConfig(name="named", arms={"base": ["fusion=gated"], "fast": ["fusion=gated", "optim.lr=0.1"]})
    with pytest.raises(ConfigError, match=f"^{key} is what arm '(base|fast)' of sweep named sets; leave it out$"):
        expand(sweep, arguments)


def test_what_no_arm_sets_can_be_overwritten() -> None:
    sweep = SweepConfig(name="named", arms={"base": ["fusion=gated"]})
    assert len(expand(sweep, ["fusion.gate_init=0.3,0.7", "optim.lr=1"])) == 2


def test_the_same_value_twice_is_two_jobs_for_the_sweeper_to_refuse() -> None:
    jobs = expand(SweepConfig(), ["fusion=gain,gain"])
    assert len(jobs) == 2 and jobs[0] == jobs[1]


def test_no_value_is_no_axis_that_could_be_run() -> None:
    with pytest.raises(HydraException):
        expand(SweepConfig(), ["fusion=gain,"])


def test_nothing_is_changed_by_expanding() -> None:
    sweep = SweepConfig(name="x", arms={"a": ["fusion=gain"]}, grid={"init": ["fla"]}, seeds=[1])
    before = repr(sweep)
    expand(sweep, ["init=official", "seed_init=1,2"])
    assert repr(sweep) == before and expand(sweep, []) == expand(sweep, [])


# ---- values from YAML to Hydra's command line


def parsed(value: Any) -> Any:
    override = OverridesParser.create().parse_override(f"key={hydra_value(value)}")
    assert not override.is_sweep_override()
    return OmegaConf.to_object(OmegaConf.create({"key": override.value()}))["key"]


@pytest.mark.parametrize(
    "value",
    [
        "gain", "branch_norm", "P*8", "R M*21 R", "it's", 'say "hi"', "a,b", "a=b", "[a]", "{a: b}", "a:b", "$x", "",
        " padded ", "/tmp/a b.txt", "100%", "a#b", "a\tb", "naïve text", 0, 3, -1, 0.001, 1e-05,
        3e20, True, False, None, [0.5, 0.5], [], ["hamlet", "king lear"], [["a"], ["b", 1]], [None, True, -0.5],
        "3.5M", "007",
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_survives_hydras_grammar(value: Any) -> None:
    found = parsed(value)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", ["null", "true", "1e3", "naïve", "日本", "ends in \\"], ids=repr)
def test_text_stays_text(value: str) -> None:
    assert parsed(value) == value


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fusion=gated", "gated"),
        ("fusion.gate_init=0.3", "gate_init=0.3"),
        ("model.rwkv.num_heads=4", "num_heads=4"),
        ("+init=fla", "fla"),
        ("model.pattern='a=b'", "pattern='a=b'"),
    ],
)
def test_label(line: str, expected: str) -> None:
    assert label(line) == expected


# ---- the sweeps that come with the project


@pytest.mark.parametrize("path", sorted((CONF_DIR / "sweep").glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_named_sweeps_are_well_formed(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    described = content.get("sweep", content)
    if path.stem == "none":
        assert not any(described.values())
        return
    sweep = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), described))
    assert sweep.name == path.stem and "?" in sweep.question
    assert path.read_text().splitlines()[0].startswith("# @package _global_")
    if sweep.search.n_trials is not None:
        space = Space(sweep.search.space)
        assert sweep.search.enqueue and not sweep.seeds
        for params in sweep.search.enqueue:
            assert space.check_params(params, "enqueue").keys() == sweep.search.space.keys()
        return
    # A search by hand may look at one seed; what it finds is compared over others.
    assert len(sweep.seeds) >= 2 or (path.stem.endswith("_search") and len(sweep.seeds) == 1)
    jobs = expand(sweep, [])
    arms = {job.variant for job in jobs}
    assert len(arms) > 1 and sweep.baseline in arms and len(jobs) == len(arms) * len(sweep.seeds)


def test_smoke_compares_all_fusions() -> None:
    content = yaml.safe_load((CONF_DIR / "sweep" / "smoke.yaml").read_text())["sweep"]
    assert sorted(content["arms"]) == sorted(path.stem for path in (CONF_DIR / "fusion").glob("*.yaml"))
    assert all(f"fusion={arm}" in overrides for arm, overrides in content["arms"].items())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["model.pattern=P"], "^model.pattern is what arms of sweep named differ in; leave it out$"),
        (["model.pattern=P,P*2"], "^model.pattern is what arms of sweep named differ in"),
        (["blocks=p4"], "^blocks sets model.pattern, which is what arms of sweep named differ in; leave it out$"),
        (["model.d_model=64", "fusion=gain", "fusion.gate_init=0.5", "init=fla"], None),
    ],
)
def test_the_command_line_makes_no_hybrids_of_controls(given: list[str], expected: str | None) -> None:
    """What an arm's choice of a model stands for, though the arm does not name it."""
    arms = {"hybrid": ["optim.lr=1e-3"], "rwkv": ["model=rwkv6"], "attention": ["model=transformer"]}
    sweep = SweepConfig(name="named", arms=arms)
    if expected is None:
        assert len(expand(sweep, given)) == 3
    else:
        with pytest.raises(ConfigError, match=expected):
            expand(sweep, given)
    sweep.only = ["rwkv"]  # by itself an arm differs from nothing
    assert all("rwkv" in job.variant for job in expand(sweep, given))


@pytest.mark.parametrize("key", ["only", "seeds"])
def test_an_empty_list_is_not_everything(key: str) -> None:
    sweep = SweepConfig(name="named", arms={"a": [], "b": ["fusion=gain"]}, seeds=[1, 2])
    setattr(sweep, key, [])
    with pytest.raises(ConfigError, match=rf"^sweep.{key}=\[\] leaves nothing to run"):
        expand(sweep, [])


def test_a_grid_of_blocks_keeps_its_patterns() -> None:
    sweep = SweepConfig(name="named", grid={"blocks": ["p4", "p8"]})
    assert len(expand(sweep, ["model=tiny"])) == 2  # blocks come after the model
    with pytest.raises(ConfigError, match=r"^model.pattern is what arms of sweep named differ in"):
        expand(sweep, ["model.pattern=P"])
    assert len(expand(sweep, ["blocks=p4"])) == 1  # an axis of the grid can be replaced


def test_only_some_arms() -> None:
    sweep = SweepConfig(name="named", arms={"a": ["fusion=gain"], "b": ["fusion=gated"]}, only=["b"])
    assert [job.variant for job in expand(sweep, [])] == ["b"]
    with pytest.raises(ConfigError, match=r"c is no arm of named \(there are a, b\)"):
        expand(SweepConfig(name="named", arms=sweep.arms, only=["c"]), [])


def test_only_some_places_of_a_grid() -> None:
    grid = {"optim.lr": [0.1, 0.2]}
    arms = {"a": ["fusion=gain"], "b": ["fusion=gated"]}

    def names(**settings: Any) -> list[str | None]:
        return [job.variant for job in expand(SweepConfig(name="named", grid=grid, **settings), [])]

    assert names(arms=arms, only=["b"]) == ["b-lr=0.1", "b-lr=0.2"]
    assert names(arms=arms, only=["b-lr=0.2", "a"]) == ["a-lr=0.1", "a-lr=0.2", "b-lr=0.2"]
    assert names(only=["lr=0.2"]) == ["lr=0.2"]
    with pytest.raises(ConfigError, match=r"lr=0.3 is no arm of named \(there are lr=0.1, lr=0.2\)"):
        names(only=["lr=0.3"])


def test_smoke_has_two_seeds() -> None:
    content = yaml.safe_load((CONF_DIR / "sweep" / "smoke.yaml").read_text())["sweep"]
    assert content["seeds"] == [0, 1]
