"""The configuration: what it accepts, and the one line that answers everything else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hybrid.config import (
    ConfigError,
    from_yaml,
    resolve,
    schema_keys,
    to_yaml,
    unknown_key,
    validate,
)
from tests.hybrid.configs import config


def refused(*overrides: str) -> str:
    """The message that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 400, message
    return message


# ---- what is refused


# override(s) -> words that the message must have; the key itself is always one of them
BAD = [
    ("model.pattern=X", "unknown block"),
    ("model.pattern=P*0", "repetition of 0"),
    ("model.pattern=''", "empty pattern"),
    ("model.pattern=5", "cannot read"),
    ("model.d_model=4", "at least 8"),
    ("model.d_model=-128", "at least 8"),
    ("model.d_model=128.5", "Integer"),
    ("model.d_model=wide", "Integer"),
    ("model.d_model=true", "Integer"),
    ("model.name=null", "None"),
    ("model.dropout=1", "[0, 1)"),
    ("model.dropout=-0.1", "[0, 1)"),
    ("model.dropout=nan", "[0, 1)"),
    ("model.branch_dropout=[0.1]", "two shares"),
    ("model.branch_dropout=[0.1,0.1,0.1]", "two shares"),
    ("model.branch_dropout=[-0.1,0]", "two shares"),
    ("model.branch_dropout=[0,1.1]", "two shares"),
    ("model.branch_dropout=[nan,0]", "two shares"),
    ("model.branch_dropout=[0.6,0.5]", "together at most 1"),
    ("model.branch_dropout=0.5", "model.branch_dropout: a list is needed"),
    ("gates.on_fail=stop", "gates.on_fail: a section of keys is needed"),
    ("model.ffn_hidden=0", "at least 1"),
    ("model.ffn_mult=0", "above 0"),
    ("model.ffn_mult=inf", "above 0"),
    ("model.norm_eps=0", "above 0"),
    ("model.target_params=-1", "3.5M"),
    ("model.target_params=0", "3.5M"),
    ("model.target_params=many", "3.5M"),
    ("model.target_params=nan", "3.5M"),
    ("model.target_params=5.2MM", "3.5M"),
    ("model.target_params=[1]", "3.5M"),
    ("model.target_params=true", "3.5M"),
    ("model.branches=[rwkv]", "two branches"),
    ("model.branches=[rwkv,mamba,rwkv]", "two branches"),
    ("model.branches=[rwkv,mamba2]", "did you mean mamba?"),
    ("model.branches=rwkv", ""),
    ("model.rwkv.num_heads=0", "at least 1"),
    ("model.rwkv.num_heads=3", ""),
    ("model.rwkv.expand_k=0.3", "model.rwkv.num_heads=4"),
    ("model.rwkv.expand_k=0", "num_heads"),
    ("model.rwkv.expand_v=-1", "num_heads"),
    ("model.rwkv.shift_low_rank=0", "at least 1"),
    ("model.rwkv.decay_low_rank=0", "at least 1"),
    ("model.mamba.state_size=0", "at least 1"),
    ("model.mamba.head_dim=48", "expand*d_model=256"),
    ("model.mamba.head_dim=0", "at least 1"),
    ("model.mamba.expand=0", "at least 1"),
    ("model.mamba.expand=1.5", "Integer"),
    ("model.mamba.n_groups=3", "4 Mamba heads"),
    ("model.mamba.conv_kernel=1", "2, 3 or 4"),
    ("model.mamba.conv_kernel=5", "2, 3 or 4"),
    ("fusion.name=gatd", "did you mean gated?"),
    ("fusion.branch_norm=rmsnorm", "did you mean rms?"),
    ("fusion.gate_init=0", "strictly between 0 and 1"),
    ("fusion.gate_init=1", "strictly between 0 and 1"),
    ("fusion.gate_init=nan", "strictly between 0 and 1"),
    ("fusion.gate_init=half", "Float"),
    ("fusion.gate_init=null", "needs it"),
    ("init.name=offical", "did you mean official?"),
    ("data.name=shakespear", "did you mean shakespeare?"),
    ("data.tokenizer=word", "char, bpe"),
    ("data.seq_len=0", "at least 1"),
    ("data.vocab_size=256", "at least 257"),
    ("data.val_fraction=0", "between 0 and 1"),
    ("data.val_fraction=1", "between 0 and 1"),
    ("data.works=hamlet", ""),
    ("optim.name=sgd", "adamw"),
    ("optim.lr=0", "above 0"),
    ("optim.lr=-1", "above 0"),
    ("optim.lr=nan", "above 0"),
    ("optim.lr=inf", "above 0"),
    ("optim.lr=fast", "Float"),
    ("optim.eps=0", "above 0"),
    ("optim.betas=[0.9]", "two numbers"),
    ("optim.betas=[0.9,1.0]", "[0, 1)"),
    ("optim.betas=[nan,0.9]", "[0, 1)"),
    ("optim.betas=0.9", ""),
    ("optim.weight_decay=-0.1", "at least 0"),
    ("optim.grad_clip=-1", "at least 0"),
    ("optim.rwkv_lr_mult=-1", "at least 0"),
    ("optim.mamba_lr_mult=inf", "at least 0"),
    ("optim.fusion_lr_mult=nan", "at least 0"),
    ("schedule.name=cosin", "did you mean cosine?"),
    ("schedule.warmup_steps=-1", "at least 0"),
    ("schedule.warmup_steps=5000", "below trainer.max_steps=5000"),
    ("schedule.min_lr_ratio=1.1", "[0, 1]"),
    ("schedule.min_lr=1", "optim.lr=0.0003"),
    ("stopping.act=maybe", "bool"),
    ("stopping.overfitting.rise=0", "above 0"),
    ("stopping.overfitting.rise=nan", "above 0"),
    ("stopping.overfitting.enabled=1.5", "bool"),
    ("stopping.plateau.min_delta=-0.1", "at least 0"),
    ("stopping.plateau.min_delta=inf", "at least 0"),
    ("stopping.plateau.reduce_after=0", "strictly between 0 and 1"),
    ("stopping.plateau.lr_factor=1", "strictly between 0 and 1"),
    ("stopping.plateau.stop_after=1", "strictly between 0 and 1"),
    ("stopping.reductions.limit=0", "at least 1"),
    ("stopping.reductions.min_gain=0", "above 0"),
    ("stopping.oscillation.swing=-1", "above 0"),
    ("stopping.oscillation.window=20", "strictly between 0 and 1"),
    ("stopping.oscillation.rises=0", "at least 1"),
    ("stopping.collapse.variance=0", "above 0"),
    ("stopping.collapse.probes=0", "at least 1"),
    ("stopping.grad_ratio.low=10", "below stopping.grad_ratio.high=10"),
    ("stopping.grad_ratio.high=0", "above 0"),
    ("stopping.grad_ratio.min_steps=0", "at least 1"),
    ("stopping.grad_ratio.share=nan", "strictly between 0 and 1"),
    ("trainer.max_steps=0", "at least 1"),
    ("trainer.max_steps=1.5", "Integer"),
    ("trainer.batch_size=0", "at least 1"),
    ("trainer.grad_accum=0", "at least 1"),
    ("trainer.eval_every=0", "at least 1"),
    ("trainer.eval_batch_size=0", "at least 1"),
    ("trainer.log_every=0", "at least 1"),
    ("trainer.checkpoint_every=0", "at least 1"),
    ("trainer.device=gpu", "cuda"),
    ("trainer.device=cuda:x", "cuda:N"),
    ("trainer.dtype=float16", "bfloat16"),
    ("trainer.compile=maybe", "bool"),
    ("kernels.wkv6=cuda", "torch, triton, fla"),
    ("kernels.ssd=fla", "mamba_ssm"),
    ("sweep.name=../x", "letters, digits"),
    ("sweep.seeds=[a]", "Integer"),
    ("display.progress=on", "auto, bar, plain, off"),
    ("seed_init=x", "Integer"),
    ("seed_data=null", ""),
    ("model.rwkv.expand_k=nan", ""),
    ("model.rwkv.expand_v=inf", ""),
    ("model.vocab_size=0", ""),
    ("model.vocab_size=-5", ""),
    ("seed_data=-1", ""),
    ("init.name='a\n\nb'", ""),
]


@pytest.mark.parametrize("override, words", BAD)
def test_bad_value_is_refused_in_a_line_that_names_the_key(override: str, words: str) -> None:
    message = refused(override)
    key = override.partition("=")[0]
    assert key in message and words in message, message


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("model=transformer", "model.attention.num_heads=0"), "model.attention.num_heads must be at least 1"),
        (("model=transformer", "model.attention.num_heads=3"), "model.attention.num_heads=3"),
        (("model=transformer", "model.attention.num_heads=128"), "even heads"),
        (("model.ffn_hidden=10", "model.target_params=5M"), "model.ffn_hidden and model.target_params exclude"),
        (("fusion=gain", "gate_init=balanced"), "fusion.gate_init=0.5 has no effect with fusion=gain"),
        (("fusion=gain", "fusion.gain_init=[1]"), "fusion.gain_init must be two numbers"),
        (("fusion=gain", "fusion.gain_init=[1,x]"), "fusion.gain_init[1]"),
        (("fusion=gain", "fusion.window=8"), "fusion.window=8 has no effect with fusion=gain"),
        (("fusion=weighted", "fusion.weight_init=2"), "fusion.weight_init must be strictly between 0 and 1"),
        (("fusion=concat", "fusion.proj_init=eye"), "fusion.proj_init must be one of identity, random"),
        (("fusion=residual", "fusion.proj_init=randm"), "did you mean random?"),
        (("fusion=cross_attention", "fusion.window=0"), "fusion.window must be at least 1"),
        (("fusion=cross_attention", "fusion.num_heads=0"), "fusion.num_heads must be at least 1"),
        (("fusion=cross_attention", "fusion.head_dim=null"), "fusion.head_dim is not set"),
        (("data=text", "data.works=[hamlet]"), "data.works goes with data=shakespeare only"),
        (("fusion=gain", "fusion.gain_init=[nan,1]"), "fusion.gain_init"),
        (("model=rwkv6", "model.branch_dropout=[0,0.1]"), "no block has two branches"),
        (("model=transformer", "model.attention.rope_base=0"), "model.attention.rope_base"),
        (("model=transformer", "model.attention.rope_base=-3"), "model.attention.rope_base"),
        (("model=transformer", "model.attention.rope_base=nan"), "model.attention.rope_base"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_do_not_go_together(overrides: tuple[str, ...], words: str) -> None:
    assert words in refused(*overrides)


def test_sizes_of_absent_branches_are_not_asked_for() -> None:
    """``model.rwkv`` stands in every configuration; only a model that has it must get on with it."""
    assert config("model=mamba2", "model.d_model=120", "model.rwkv.num_heads=7", "model.mamba.head_dim=48")
    assert config("model=rwkv6", "model.mamba.head_dim=77", "model.attention.num_heads=7")
    assert config("model=transformer", "model.rwkv.expand_k=0.3", "model.mamba.n_groups=9")
    assert config("model.pattern=P", "model.branches=[mamba,mamba]", "model.rwkv.num_heads=7")
    assert "num_heads=7" in refused("model=rwkv_rwkv", "model.rwkv.num_heads=7")


@pytest.mark.parametrize(
    "plain, words",
    [
        ({"modle": {"name": "x"}}, "unknown key 'modle'; did you mean 'model'?"),
        ({"model": {"patern": "P"}}, "unknown key 'model.patern'; did you mean 'model.pattern'?"),
        ({"model": {"mamba": {"stat_size": 1}}}, "did you mean 'model.mamba.state_size'?"),
        ({"optim": {"learning_rate": 1}}, "unknown key 'optim.learning_rate'"),
        ({"optim": {"rwkv_lr_mul": 1}}, "did you mean 'optim.rwkv_lr_mult'?"),
        ({"trainer": {"lr": 1}}, "did you mean 'optim.lr'?"),
        ({"trainer": {"seq_len": 1}}, "did you mean 'data.seq_len'?"),
        ({"zzzzqqq": 1}, "--help lists the keys"),
        ({}, "model.name is not set"),
        ({"model": {"name": "x"}}, "fusion.name is not set"),
        ({"model": {"name": "x"}, "fusion": {"name": "gain", "gain_init": [1, 1]}}, "data.name is not set"),
        ({"model": None}, "model"),
        ({"model": {"name": "${nope}"}}, "model.name"),
        ({"model": 5}, "model:"),
        ({"optim": [1]}, "optim:"),
        ({"out": "${nope}"}, "out"),
    ],
    ids=str,
)  # fmt: skip
def test_structure(plain: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(OmegaConf.create(plain))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_key_knows_keys_of_other_choices() -> None:
    assert unknown_key("fusion.gate_init") == "fusion.gate_init has no effect with this choice of fusion; leave it out"
    assert unknown_key("sweep.arms").startswith("arms are added one by one: '+sweep.arms.NAME=")
    assert unknown_key("data.seqlen") == "unknown key 'data.seqlen'; did you mean 'data.seq_len'?"
    assert unknown_key("seed_int") == "unknown key 'seed_int'; did you mean 'seed_init'?"
    keys = schema_keys()
    assert len(keys) == len(set(keys)) and {"model", "model.rwkv.expand_k", "seed_init", "sweep.arms"} <= set(keys)


def test_checking_changes_nothing_but_the_written_count() -> None:
    cfg = config("model.target_params=5.2M")
    assert cfg.model.target_params == 5_200_000
    before = copy.deepcopy(cfg)
    validate(cfg)
    assert cfg == before


# ---- reading back


def test_options_read_back_the_same(tmp_path: Path) -> None:
    cfg = config(
        "fusion=gain", "fusion.gain_init=[0.7,0.3]", "model.target_params=5.2M", "variant='a: b'", "optim.lr=1e-5"
    )
    assert (cfg.model.target_params, cfg.optim.lr) == (5_200_000, 1e-5)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert from_yaml(tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "model.name is not set"),
        (b"5", "cannot read"),
        (b"[1, 2]", "holds no configuration"),
        (b"model: {", "cannot read"),
        (b"seed_init: 1\nseed_init: 2", "cannot read"),
        (b"model: {patern: P}", "did you mean 'model.pattern'?"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"out: '${'", ""),
    ],
    ids=str,
)
def test_files_that_are_no_configuration(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        from_yaml(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read") as caught:
            from_yaml(path)
        assert str(path) in str(caught.value)
