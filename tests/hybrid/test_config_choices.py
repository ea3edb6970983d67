"""What can be chosen, and the configuration as Hydra itself composes it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from hybrid.config import (
    CONF_DIR,
    from_yaml,
    group_options,
    identity,
    parse_count,
    resolve,
    to_yaml,
)
from hybrid.schema import Config, DataConfig, FusionConfig
from tests.hybrid.configs import config

# ---- what can be chosen


def choices() -> list[tuple[str, str]]:
    groups = [
        "model",
        "fusion",
        "init",
        "data",
        "optim",
        "schedule",
        "trainer",
        "kernels",
        "gates",
        "stopping",
        "blocks",
        "gate_init",
        "sweep",
        "sampler",
        "pruner",
    ]
    assert {path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        *groups,
        "hydra",
    }
    return [(group, option) for group in groups for option in group_options(group)]


@pytest.mark.parametrize("group, option", choices(), ids=lambda value: value)
def test_every_choice_is_valid_and_reads_back_the_same(group: str, option: str, tmp_path: Path) -> None:
    cfg = config(f"{group}={option}")
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    again = from_yaml(tmp_path / "config.yaml")
    assert again == cfg and identity(again) == identity(cfg)
    if group in ("sampler", "pruner"):
        assert getattr(cfg.sweep.search, group)["_target_"].startswith(f"optuna.{group}s.")
    elif group == "gates":
        assert cfg.gates.enabled == (option == "default")
    elif group not in ("blocks", "gate_init", "sweep", "trainer", "stopping"):
        assert getattr(cfg, group).name == option if group != "kernels" else cfg.kernels.wkv6 == option


def test_files_of_a_group_say_the_schemas_defaults() -> None:
    """A key that a file leaves out would silently take the schema's value; the two must agree."""
    for group, option in (("optim", "adamw"), ("schedule", "cosine"), ("trainer", "default"), ("kernels", "auto"),
                          ("gates", "default"), ("stopping", "default")):  # fmt: skip
        found = dataclasses.asdict(getattr(config(), group))
        default = dataclasses.asdict({f.name: f for f in dataclasses.fields(Config)}[group].default_factory())
        assert found == default, f"{group}={option}"
        assert yaml.safe_load((CONF_DIR / group / f"{option}.yaml").read_text()).keys() == default.keys()
    base = yaml.safe_load((CONF_DIR / "model" / "_base.yaml").read_text())
    model = dataclasses.asdict(config("model=hybrid_5m").model)
    assert {**base, "name": "hybrid_5m"} == model


def test_blocks_and_gate_init_are_axes_of_their_own() -> None:
    assert config("model=hybrid_6m", "blocks=p4").model.pattern == "P*4"
    assert [config(f"gate_init={name}").fusion.gate_init for name in ("mamba_heavy", "balanced", "rwkv_heavy")] == [
        0.3, 0.5, 0.7,
    ]  # fmt: skip
    assert config("fusion=gated_channel", "gate_init=rwkv_heavy").fusion.gate_init == 0.7


def test_counts_can_be_written_as_people_do() -> None:
    for written, count in {
        "3.5M": 3_500_000, "5.2m": 5_200_000, "800K": 800_000, "1B": 10**9, "3.5e6": 3_500_000, "250000": 250_000,
        3_500_000: 3_500_000, 4.5e6: 4_500_000, " 8M ": 8_000_000, "1": 1,
    }.items():  # fmt: skip
        assert parse_count("model.target_params", written) == count
        assert isinstance(parse_count("model.target_params", written), int)
    assert parse_count("model.target_params", None) is None


# ---- the composed configuration, by Hydra itself


def by_hydra(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve(compose("config", list(overrides)))


def test_tests_own_composition_is_hydras() -> None:
    overrides = ("model=tiny", "fusion=gain", "fusion.gain_init=[0.7,0.3]", "model.pattern='R M*2'", "optim.lr=0.01",
                 "model.target_params=1M", "schedule.min_lr=null", "trainer.compile=true", "variant=x")  # fmt: skip
    assert config(*overrides) == by_hydra(*overrides)
    assert config() == by_hydra()
    defaults = config()
    assert (defaults.model.name, defaults.fusion.name, defaults.fusion.gate_init) == ("hybrid_5m", "gated", 0.3)
    assert (defaults.init.name, defaults.data.name, defaults.data.seq_len) == ("official", "shakespeare", 1024)
    assert (defaults.optim.lr, defaults.schedule.warmup_steps, defaults.trainer.max_steps) == (3e-4, 2000, 5000)
    assert (defaults.out, defaults.seed_init, defaults.seed_data, defaults.sweep.name) == ("outputs", 0, 0, None)


def test_every_fusion_file_has_exactly_its_options() -> None:
    own = {
        "gain": {"gain_init"}, "weighted": {"weight_init"}, "gated": {"gate_init"}, "gated_channel": {"gate_init"},
        "concat": {"proj_init"}, "residual": {"proj_init"}, "cross_attention": {"num_heads", "head_dim", "window"},
    }  # fmt: skip
    options = {field.name for field in dataclasses.fields(FusionConfig)}
    for name in group_options("fusion"):
        given = yaml.safe_load((CONF_DIR / "fusion" / f"{name}.yaml").read_text()).keys()
        assert given == {"name", "branch_norm"} | own[name] and given <= options


def test_data_defaults() -> None:
    assert dataclasses.replace(config().data, name="text") == DataConfig(name="text")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("fusion=gatd",), "did you mean gated?"),
        (("model.patern=P",), "did you mean 'model.pattern'?"),
        (("fusion=gain", "fusion.gate_init=0.5"), "fusion.gate_init has no effect"),
        (("model.rwkv.num_heads=0",), "model.rwkv.num_heads must be at least 1"),
        (("model.rwkv.expand_k=nan",), "model.rwkv.expand_k"),
    ],
    ids=str,
)
def test_command_line_answers_within_two_seconds_and_without_torch(arguments: tuple[str, ...], words: str) -> None:
    """Processor time, so that a busy machine does not fail it."""
    code = (
        "import sys, time; from hybrid.train import main\n"
        "try: main()\n"
        "finally: print(time.process_time(), 'torch' in sys.modules, 'fla' in sys.modules)"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=CONF_DIR.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr
    seconds, *loaded = done.stdout.split()
    assert loaded == ["False", "False"] and float(seconds) < 2 and time.monotonic() - begun < 30
