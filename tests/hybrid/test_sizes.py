"""Counted parameters are those of built models; targets are met; states and arithmetic are what the layers have."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hybrid import build_model
from hybrid.config import CONF_DIR, ConfigError, group_options
from hybrid.model import count_built
from hybrid.schema import FusionConfig, MambaConfig, RWKVConfig
from hybrid.sizes import (
    PARTS,
    count_params,
    ffn_hidden,
    flops_per_token,
    fusion_params,
    mamba_params,
    rwkv_params,
    state_floats_per_layer,
)
from tests.hybrid.configs import STACKS, config, small

FUSION_NAMES = group_options("fusion")
CHARACTERS = "model.vocab_size=97"
MAIN = ("hybrid_5m", "hybrid_6m", "hybrid_8m")


def assert_counted(*overrides: str) -> None:
    cfg = config(*overrides)
    counted, model = count_params(cfg), build_model(cfg)
    assert counted["total"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {part: n for part, n in counted.items() if n and part != "total"} == count_built(model)
    assert tuple(counted) == PARTS and counted["total"] == sum(counted[part] for part in PARTS[1:])


# ---- counting


@pytest.mark.parametrize("preset", group_options("model"))
def test_preset(preset: str) -> None:
    assert_counted(f"model={preset}", CHARACTERS)


@pytest.mark.parametrize("fusion", FUSION_NAMES)
@pytest.mark.parametrize("preset", ["tiny", "hybrid_6m"])
def test_preset_with_fusion(preset: str, fusion: str) -> None:
    assert_counted(f"model={preset}", f"fusion={fusion}", CHARACTERS, "fusion.branch_norm=rms")


@pytest.mark.parametrize("stack", STACKS)
def test_stack(stack: str) -> None:
    cfg = small(*STACKS[stack])
    assert count_params(cfg)["total"] == sum(p.numel() for p in build_model(cfg).parameters())


@pytest.mark.parametrize(
    "option",
    [
        "model.rwkv.expand_k=1.0",
        "model.rwkv.expand_k=0.25",
        "model.rwkv.expand_v=2.0",
        "model.rwkv.num_heads=8",
        "model.rwkv.shift_low_rank=7",
        "model.rwkv.decay_low_rank=9",
        "model.mamba.state_size=24",
        "model.mamba.head_dim=16",
        "model.mamba.expand=3",
        "model.mamba.n_groups=2",
        "model.mamba.conv_kernel=3",
        "model.ffn_hidden=11",
        "model.ffn_mult=1.3",
        "model.target_params=300K",
        "model.d_model=96",
    ],
)
def test_option(option: str) -> None:
    assert_counted("model=tiny", "model.pattern='P R M A'", CHARACTERS, option)


@pytest.mark.parametrize("option", ["fusion.num_heads=5", "fusion.head_dim=9", "fusion.window=7"])
def test_option_of_cross_attention(option: str) -> None:
    assert_counted("model=tiny", "fusion=cross_attention", CHARACTERS, option)


def test_known_numbers() -> None:
    """Measured on FLA's layers at width 128; 8 gated blocks with 97 characters."""
    assert rwkv_params(128, RWKVConfig()) == 119_936
    assert mamba_params(128, MambaConfig()) == 134_412
    assert mamba_params(128, MambaConfig(state_size=64)) == 117_388
    assert fusion_params(128, FusionConfig(name="gated")) == 257
    assert count_params(config("model=hybrid_5m", CHARACTERS)) == {
        "total": 3_100_008,
        "embedding": 97 * 128,
        "rwkv": 8 * 119_936,
        "mamba": 8 * 134_412,
        "attention": 0,
        "fusion": 8 * 257,
        "ffn": 8 * 2 * 128 * 512,
        "norm": 17 * 128,
    }


def test_presets_as_they_stand() -> None:
    """What the shapes of the specification really count, with 97 characters."""
    totals = {name: count_params(config(f"model={name}", CHARACTERS))["total"] for name in group_options("model")}
    assert totals == {
        "tiny": 189_850,
        "hybrid_5m": 3_100_008,
        "hybrid_6m": 5_759_840,
        "hybrid_8m": 9_616_740,
        "rwkv_rwkv": 2_984_200,
        "mamba_mamba": 3_215_816,
        "rwkv6": 2_022_656,
        "mamba2": 2_138_464,
        "transformer": 1_587_456,
        "sequential_balanced": 6_095_612,
        "sequential_rwkv_heavy": 3_675_000,
        "sequential_mamba_heavy": 8_236_008,
    }


# ---- targets


def reached(target: float, *overrides: str) -> float | None:
    """Relative distance of the counted total from a target in millions; None where the target cannot be met."""
    cfg = config(CHARACTERS, *overrides)
    cfg.model.target_params = round(target * 1e6)
    try:
        hidden = ffn_hidden(cfg)
    except ConfigError as error:
        assert_one_line(error, "model.target_params")
        return None
    assert hidden >= 1
    return abs(count_params(cfg)["total"] / cfg.model.target_params - 1)


def assert_one_line(error: ConfigError, *words: str) -> None:
    assert "\n" not in str(error) and all(word in str(error) for word in words), str(error)


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_targets_of_the_main_shapes(fusion: str) -> None:
    """3.5M, 5.2M, 6.5M and 8.0M, each where the branches alone do not count more."""
    possible = {
        (preset, target)
        for preset in MAIN
        for target in (3.5, 5.2, 6.5, 8.0)
        if (distance := reached(target, f"model={preset}", f"fusion={fusion}")) is not None and distance <= 0.005
    }
    expected = {("hybrid_5m", target) for target in (3.5, 5.2, 6.5, 8.0)}
    expected |= {("hybrid_6m", target) for target in (5.2, 6.5, 8.0)} | {("hybrid_8m", 8.0)}
    # The branches of hybrid_8m leave 0.42M for the rest; residual takes all of that.
    if fusion in ("gain", "weighted", "gated"):
        expected |= {("hybrid_8m", 6.5)}
    assert possible == expected


@pytest.mark.parametrize("fusion", FUSION_NAMES)
def test_every_fusion_fits_its_name_sized_model(fusion: str) -> None:
    for preset, target in zip(MAIN, (5.2, 6.5, 8.0), strict=True):
        assert reached(target, f"model={preset}", f"fusion={fusion}") <= 0.005


@pytest.mark.parametrize("preset", [name for name in group_options("model") if name not in MAIN])
def test_controls_match_the_main_model(preset: str) -> None:
    """Every control and prototype can be made as large as the 5.2M main model."""
    assert reached(5.2, f"model={preset}") <= 0.005


def test_solved_model_is_built_that_large() -> None:
    model = build_model(config("model=hybrid_5m", CHARACTERS, "model.target_params=5.2M"))
    assert abs(sum(p.numel() for p in model.parameters()) / 5.2e6 - 1) <= 0.005
    assert model.blocks[0].ffn.up.weight.shape == (1537, 128)


def test_smoke_arms_are_of_one_size() -> None:
    """The named sweep compares fusions: none may win by size."""
    totals = []
    for fusion in FUSION_NAMES:
        cfg = config("sweep=smoke", f"fusion={fusion}", "model.vocab_size=71")
        totals.append(count_params(cfg)["total"])
        assert abs(totals[-1] / 250_000 - 1) <= 0.005
    assert max(totals) / min(totals) - 1 <= 0.005


@pytest.mark.parametrize(
    "target, preset, words",
    [
        ("1M", "hybrid_5m", ("1,000,000", "0.5%", "model.d_model", "model.pattern", "2,048")),
        ("3.5M", "hybrid_8m", ("3,500,000", "6,077,796")),
        ("4M", "sequential_mamba_heavy", ("4,000,000",)),
        ("1", "tiny", ("model.target_params=1 ",)),
    ],
)
def test_impossible_target_is_a_line(target: str, preset: str, words: tuple[str, ...]) -> None:
    cfg = config(f"model={preset}", CHARACTERS, f"model.target_params={target}")
    for ask in (ffn_hidden, count_params, build_model):
        with pytest.raises(ConfigError) as caught:
            ask(cfg)
        assert_one_line(caught.value, "model.target_params", *words)


def test_target_between_two_widths_takes_the_nearer_and_refuses_what_is_too_far() -> None:
    """At width 64 with 40 blocks one unit of FFN is 5,120 parameters."""
    base = ("model=transformer", "model.pattern=A*40", "model.d_model=64", CHARACTERS)
    bare = count_params(config(*base, "model.ffn_hidden=1"))["total"] - 5_120
    for asked, hidden in ((bare + 2_559 + 5_120 * 9, 9), (bare + 2_561 + 5_120 * 9, 10)):
        assert ffn_hidden(config(*base, f"model.target_params={asked}")) == hidden
    for asked in (bare - 3_000, bare + 5_120 * 7):  # no width at all, and one below d_model/8
        with pytest.raises(ConfigError, match=r"model\.target_params"):
            ffn_hidden(config(*base, f"model.target_params={asked}"))


def test_vocabulary_has_to_be_known() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set") as caught:
        count_params(config("model=tiny"))
    assert_one_line(caught.value)


# ---- state and arithmetic


def test_state_floats_at_width_128() -> None:
    assert state_floats_per_layer(config("model=rwkv6", CHARACTERS)) == [2_048] * 8
    assert state_floats_per_layer(config("model=mamba2", CHARACTERS)) == [32_768] * 8
    assert state_floats_per_layer(config("model=hybrid_5m", CHARACTERS)) == [34_816] * 8
    wide = config("model=rwkv6", CHARACTERS, "model.rwkv.expand_k=1.0", "model.rwkv.num_heads=2")
    assert state_floats_per_layer(wide) == [8_192] * 8
    assert state_floats_per_layer(config("model=mamba2", CHARACTERS, "model.mamba.state_size=64")) == [16_384] * 8
    assert state_floats_per_layer(config("model=sequential_balanced", CHARACTERS)) == [2_048, *[32_768] * 21, 2_048]
    assert state_floats_per_layer(config("model=transformer", CHARACTERS)) == [0] * 8


@pytest.mark.parametrize("stack", [name for name in STACKS if name != "A"])
def test_state_floats_are_those_of_the_carried_state(stack: str) -> None:
    cfg = small(*STACKS[stack], "model.rwkv.expand_v=2.0", "model.mamba.expand=3", "model.mamba.n_groups=2")
    carried = build_model(cfg).initial_state(1)
    floats = [
        sum(part[key].numel() for part in block.values() for key in part.keys() & {"wkv", "ssm"}) for block in carried
    ]
    assert state_floats_per_layer(cfg) == floats


def flops(*overrides: str) -> int:
    return flops_per_token(config("model=tiny", CHARACTERS, *overrides))


def test_flops_are_three_forward_passes() -> None:
    cfg = config("model=tiny", CHARACTERS, "model.pattern='A'", "data.seq_len=99")
    counts = count_params(cfg)
    forward = 2 * (counts["total"] - counts["norm"]) + 4 * 64 * 50  # weights; attention at the mean context
    assert flops_per_token(cfg) == 3 * forward
    assert flops("model.pattern=A", "data.seq_len=199") - flops("model.pattern=A", "data.seq_len=99") == 3 * 4 * 64 * 50
    assert flops("data.seq_len=99") == flops("data.seq_len=199")  # recurrences cost the same at any length
    deeper = flops("model.pattern=P*4") - flops("model.pattern=P*2")
    assert deeper == flops("model.pattern=P*6") - flops("model.pattern=P*4")


@pytest.mark.parametrize(
    "seq_len, attended",
    [
        (64, 32.5),
        (256, (64 * 65 / 2 + 192 * 64) / 256),  # full windows from position 64 on
    ],
)
def test_flops_of_cross_attention_count_the_mean_window(seq_len: int, attended: float) -> None:
    cfg = config("model=tiny", CHARACTERS, "fusion=cross_attention", f"data.seq_len={seq_len}")
    counts = count_params(cfg)
    forward = 2 * (counts["total"] - counts["norm"]) + 5 * sum(state_floats_per_layer(cfg))
    both_ways = 2 * 2 * 4 * 64 * attended  # two blocks, two directions, heads of 64 channels together
    assert flops_per_token(cfg) == round(3 * (forward + both_ways))


@pytest.mark.parametrize("option", ["model.rwkv.num_heads=0", "model.mamba.head_dim=0", "model.rwkv.expand_k=nan"])
def test_options_of_absent_branches_do_no_harm(option: str) -> None:
    cfg = config("model=transformer", CHARACTERS, option)
    assert count_params(cfg) == count_params(config("model=transformer", CHARACTERS))
    assert flops_per_token(cfg) == flops_per_token(config("model=transformer", CHARACTERS))


def test_counting_needs_no_torch() -> None:
    """A mistake that only the sizes show is answered before torch is loaded."""
    code = (
        "import sys; from hydra import compose, initialize_config_dir; from hybrid.config import CONF_DIR, resolve; "
        "from hybrid.sizes import count_params, flops_per_token, state_floats_per_layer\n"
        "with initialize_config_dir(str(CONF_DIR), version_base='1.3'):\n"
        "    cfg = resolve(compose('config', ['model.vocab_size=97']))\n"
        "print(count_params(cfg)['total'], flops_per_token(cfg) > 0, len(state_floats_per_layer(cfg)), "
        "'torch' in sys.modules, 'fla' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF_DIR.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3100008", "True", "8", "False", "False"]
