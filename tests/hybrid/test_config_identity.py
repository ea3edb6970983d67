"""What makes a run another run."""

from __future__ import annotations

import copy
import itertools

import pytest

from hybrid.config import (
    identity,
    schema_keys,
    to_plain,
)
from hybrid.schema import Config
from tests.hybrid.configs import config, small


def changed(cfg: Config, key: str) -> Config:
    """The configuration with another value under a dotted key, of the right type but unchecked."""
    cfg = copy.deepcopy(cfg)
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = getattr(node, parent)
    value = getattr(node, leaf)
    if isinstance(value, bool):
        other = not value
    elif "on_fail" in parents:
        other = "warn" if value == "stop" else "stop"
    elif isinstance(value, int | float):
        other = value + 1
    elif isinstance(value, list):
        other = [*value, *value, 1]
    elif isinstance(value, dict):
        other = {**value, "x": ["y"]}
    else:  # a string, or an option that is not set
        other = "P" if key == "model.pattern" else "other"
    setattr(node, leaf, other)
    return cfg


LEAVES = [key for key in schema_keys() if not any(other.startswith(f"{key}.") for other in schema_keys())]


# Names, places and what a person sees; everything else can change a result.
NO_IDENTITY = {"variant", "out", "data.path", "data.cache_dir", "trainer.checkpoint_every", "trainer.tensorboard",
               "trainer.cpu_threads", "trainer.seeds_together"}  # fmt: skip


@pytest.mark.parametrize("key", LEAVES)
def test_identity_reacts_to_what_can_change_a_result(key: str) -> None:
    cfg = config("model.pattern=P A")
    same = identity(cfg) == identity(changed(cfg, key))
    # A sweep's name and stopping.act say whether stopping rules act, see below: they do in cfg.
    no_identity = key in NO_IDENTITY or (key.startswith(("display.", "sweep.")) and key != "sweep.name")
    warns_only = ("gates.G2.", "gates.G3.", "gates.G3_5.", "gates.G4.")  # such a gate changes nothing of a run
    assert same == (no_identity or key == "stopping.act" or key.startswith(warns_only))


def test_identity_has_of_the_stopping_rules_those_that_can_act() -> None:
    def stopping(*overrides: str) -> dict[str, dict[str, float]]:
        return identity(config(*overrides))["stopping"]

    alone = stopping()
    assert alone.keys() == {"overfitting", "plateau", "reductions", "oscillation", "collapse", "grad_ratio"}
    assert alone["overfitting"] == {"rise": 0.1} and stopping("stopping.act=true") == alone
    for none in (("sweep.name=x",), ("stopping.act=false", "stopping.overfitting.rise=0.2"), ("stopping=off",)):
        assert stopping(*none) == {}
    assert stopping("sweep.name=x", "stopping.act=true") == alone
    assert stopping("stopping.collapse.enabled=false", "stopping.collapse.probes=9") == {
        name: rule for name, rule in alone.items() if name != "collapse"
    }
    no_reduction = stopping("stopping.plateau.reduce=false", "stopping.plateau.lr_factor=0.7")
    assert no_reduction["plateau"] == {"min_delta": 0.001, "reduce": False, "stop": True, "stop_after": 0.2}
    assert "reductions" not in no_reduction and "reductions" not in stopping("stopping.plateau.enabled=false")
    no_stop = stopping("stopping.plateau.stop=false", "stopping.plateau.stop_after=0.3")
    assert "stop_after" not in no_stop["plateau"] and "reductions" in no_stop
    assert "plateau" not in stopping("stopping.plateau.stop=false", "stopping.plateau.reduce=false")


def test_identity_leaves_out_what_the_model_does_not_have() -> None:
    one = config("model=rwkv6", "fusion=gain")
    assert "branch_dropout" not in identity(one)["model"]
    for other in ("fusion=gated", "model.mamba.state_size=64", "model.attention.num_heads=2", "kernels.ssd=torch"):
        overrides = ("fusion=gain", other) if not other.startswith("fusion") else (other,)
        assert identity(config("model=rwkv6", *overrides)) == identity(one), other
    assert identity(config("model=rwkv6", "fusion=gain", "model.rwkv.num_heads=2")) != identity(one)


def test_identity_does_not_depend_on_how_it_was_written() -> None:
    one, other = config("model.target_params=5.2M"), config("model.target_params=5.2e6")
    assert identity(one) == identity(other)
    assert identity(config("fusion=gated", "fusion.gate_init=0.5")) == identity(config("gate_init=balanced"))
    assert identity(config("blocks=p8")) == identity(config())
    cfg = config()
    plain = to_plain(cfg)
    identity(cfg)
    assert to_plain(cfg) == plain  # asking leaves it as it was


def test_identity_of_small_differences() -> None:
    found = [
        identity(small(*overrides))
        for overrides in (
            (),
            ("seed_init=1",),
            ("seed_data=1",),
            ("optim.lr=0.0003000001",),
            ("init=fla",),
            ("fusion=gain",),
        )
    ]
    assert all(a != b for a, b in itertools.combinations(found, 2))
