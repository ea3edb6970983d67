"""The configuration's rules: what Hydra composed is merged strictly into ``hybrid.schema`` and every value checked.

Nothing here imports torch, so a mistake in a configuration is answered at once. ``resolve`` turns a composed
``DictConfig`` into a checked ``Config``; every error it raises is a ``ConfigError`` whose text is one line that
names the key and says what would be valid.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from hybrid.pattern import PatternError, branches_of, parse_pattern
from hybrid.schema import Config, FusionConfig, ModelConfig
from hybrid.stopping.settings import acting_rules, problem_of

CONF_DIR = Path(__file__).resolve().parents[1] / "conf"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that names the key."""

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*\n\s*", " ", message))


# Keys that cannot change a result and so are no part of a run's identity.
NOT_IDENTITY = (
    "sweep", "display", "variant", "out", "data.path", "data.cache_dir",
    "trainer.checkpoint_every", "trainer.tensorboard", "trainer.cpu_threads", "trainer.seeds_together",
)  # fmt: skip


def resolve(composed: DictConfig) -> Config:
    """Check what Hydra composed against the schema and the rules below; return it as dataclasses.

    Raises ``ConfigError``. Sizes that depend on the vocabulary (``model.target_params``) are solved later, by
    ``hybrid.sizes.ffn_hidden``.
    """
    cfg = read_composed(composed)
    validate(cfg)
    return cfg


def read_composed(composed: DictConfig) -> Config:
    """What Hydra composed as dataclasses: keys and types are checked, values are not. Raises ``ConfigError``."""
    try:
        plain = OmegaConf.create({key: value for key, value in composed.items() if key != "hydra"})
        check_sections(plain, Config)
        cfg: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key or 'a key'} is not set") from error
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(error.full_key or str(error.key))) from error
    except OmegaConfBaseException as error:
        key, said = error.full_key or "configuration", (error.msg or str(error)).splitlines()[0]
        raise ConfigError(f"{key}: {'a list is needed, [a,b]' if 'is not a ListConfig' in said else said}") from error
    return cfg


def check_sections(given: DictConfig, schema: type, parent: str = "") -> None:
    """Raise ``ConfigError`` for a value where the schema has a section."""
    for field in dataclasses.fields(schema):
        node = given._get_node(field.name)
        if node is None or not dataclasses.is_dataclass(field.default_factory):
            continue
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{parent}{field.name}: a section of keys is needed, got '{node}'")
        check_sections(node, field.default_factory, f"{parent}{field.name}.")


def validate(cfg: Config) -> None:
    """Raise ``ConfigError`` for the first value that no run could use."""
    from hybrid.gates import settings as gate_settings  # needs ConfigError itself

    _validate_model(cfg.model)
    _validate_fusion(cfg.fusion, cfg.model)
    for key in ("seed_init", "seed_data"):
        if not 0 <= getattr(cfg, key) < 2**63:
            raise ConfigError(f"{key} must be a whole number from 0 to 2^63-1, got {getattr(cfg, key)}")
    optim, schedule, trainer, data = cfg.optim, cfg.schedule, cfg.trainer, cfg.data
    _one_of("init.name", cfg.init.name, ["official", "fla"])
    _one_of("optim.name", optim.name, ["adamw"])
    _at_least("optim.lr", optim.lr, 0, strict=True)
    _at_least("optim.eps", optim.eps, 0, strict=True)
    for key in ("weight_decay", "grad_clip", "rwkv_lr_mult", "mamba_lr_mult", "fusion_lr_mult"):
        _at_least(f"optim.{key}", getattr(optim, key), 0)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas must be two numbers in [0, 1), got {optim.betas}")
    _one_of("schedule.name", schedule.name, ["cosine", "linear", "constant"])
    _at_least("schedule.warmup_steps", schedule.warmup_steps, 0)
    if not 0 <= schedule.min_lr_ratio <= 1:
        raise ConfigError(f"schedule.min_lr_ratio must be in [0, 1], got {schedule.min_lr_ratio}")
    if schedule.name == "constant" and (schedule.min_lr is not None or schedule.min_lr_ratio != 1):
        raise ConfigError(
            "schedule.min_lr and schedule.min_lr_ratio have no effect with schedule=constant; leave them out"
        )
    if schedule.min_lr is not None and not 0 <= schedule.min_lr <= optim.lr:
        raise ConfigError(f"schedule.min_lr must be in [0, optim.lr={optim.lr}], got {schedule.min_lr}")
    for key in ("max_steps", "batch_size", "grad_accum", "eval_every", "eval_batch_size", "log_every",
                "checkpoint_every"):  # fmt: skip
        _at_least(f"trainer.{key}", getattr(trainer, key), 1)
    if schedule.warmup_steps >= trainer.max_steps and schedule.warmup_steps > 0:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} must be below trainer.max_steps={trainer.max_steps}"
        )
    if trainer.seeds_together is not None:
        _at_least("trainer.seeds_together", trainer.seeds_together, 1)
    if trainer.cpu_threads is not None:
        _at_least("trainer.cpu_threads", trainer.cpu_threads, 1)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", trainer.device):
        raise ConfigError(f"trainer.device must be auto, cpu, cuda or cuda:N, got '{trainer.device}'")
    _one_of("trainer.dtype", trainer.dtype, ["auto", "float32", "bfloat16"])
    _one_of("kernels.wkv6", cfg.kernels.wkv6, ["auto", "torch", "triton", "fla", "triton+fla"])
    _one_of("kernels.ssd", cfg.kernels.ssd, ["auto", "torch", "triton", "mamba_ssm", "triton+mamba_ssm"])
    gate_settings.check(cfg.gates)
    _one_of("display.progress", cfg.display.progress, ["auto", "bar", "plain", "off"])
    _one_of("data.name", data.name, group_options("data"))
    _one_of("data.tokenizer", data.tokenizer, ["char", "bpe"])
    _at_least("data.seq_len", data.seq_len, 1)
    _at_least("data.vocab_size", data.vocab_size, 257)
    if not 0 < data.val_fraction < 1:
        raise ConfigError(f"data.val_fraction must be between 0 and 1, got {data.val_fraction}")
    if data.works is not None and data.name != "shakespeare":
        raise ConfigError(f"data.works goes with data=shakespeare only, not with data={data.name}")
    if (problem := problem_of(cfg.stopping)) is not None:
        raise ConfigError(problem)
    if cfg.sweep.name is not None and not re.fullmatch(r"[\w.+-]{1,80}", cfg.sweep.name):
        raise ConfigError(f"sweep.name must be letters, digits and '._+-', got '{cfg.sweep.name}'")


def used_parts(model: ModelConfig) -> set[str]:
    """Which of rwkv, mamba, attention and fusion the blocks have."""
    stack = branches_of(model.pattern, model.branches)
    fused = {"fusion"} if any(len(branches) == 2 for branches in stack) else set()
    return {branch for branches in stack for branch in branches} | fused


def _validate_model(model: ModelConfig) -> None:
    try:
        parse_pattern(model.pattern)
    except PatternError as error:
        raise ConfigError(f"model.pattern: {error}") from error
    _at_least("model.d_model", model.d_model, 8)
    if not 0 <= model.dropout < 1:
        raise ConfigError(f"model.dropout must be in [0, 1), got {model.dropout}")
    shares = model.branch_dropout
    if len(shares) != 2 or not all(0 <= share <= 1 for share in shares) or sum(shares) > 1:
        raise ConfigError(f"model.branch_dropout must be two shares of the sequences, together at most 1, got {shares}")
    if model.vocab_size is not None:
        _at_least("model.vocab_size", model.vocab_size, 1)
    if model.ffn_hidden is not None:
        _at_least("model.ffn_hidden", model.ffn_hidden, 1)
        if model.target_params is not None:
            raise ConfigError("model.ffn_hidden and model.target_params exclude each other: set one of them")
    _at_least("model.ffn_mult", model.ffn_mult, 0, strict=True)
    _at_least("model.norm_eps", model.norm_eps, 0, strict=True)
    model.target_params = parse_count("model.target_params", model.target_params)
    if len(model.branches) != 2:
        raise ConfigError(f"model.branches must name two branches, got {model.branches}")
    for branch in model.branches:
        _one_of("model.branches", branch, ["rwkv", "mamba"])
    parts = used_parts(model)
    if any(shares) and "fusion" not in parts:
        raise ConfigError(
            f"model.branch_dropout={shares} has no effect with model.pattern={model.pattern}: no block has two branches"
        )
    if "rwkv" in parts:
        rwkv = model.rwkv
        for key in ("num_heads", "shift_low_rank", "decay_low_rank"):
            _at_least(f"model.rwkv.{key}", getattr(rwkv, key), 1)
        for side in ("k", "v"):
            expand = getattr(rwkv, f"expand_{side}")
            width = model.d_model * expand
            whole = math.isfinite(width) and width > 0 and math.isclose(width, round(width))
            if not whole or round(width) % rwkv.num_heads:
                raise ConfigError(
                    f"model.rwkv.expand_{side}={expand} gives {'key' if side == 'k' else 'value'} width {width:g}, "
                    f"which does not divide into model.rwkv.num_heads={rwkv.num_heads} heads"
                )
    if "mamba" in parts:
        mamba = model.mamba
        for key in ("state_size", "head_dim", "expand", "n_groups", "conv_kernel"):
            _at_least(f"model.mamba.{key}", getattr(mamba, key), 1)
        inner = mamba.expand * model.d_model
        if inner % mamba.head_dim:
            raise ConfigError(
                f"model.mamba.head_dim={mamba.head_dim} does not divide expand*d_model={inner} "
                f"(model.mamba.expand={mamba.expand}, model.d_model={model.d_model})"
            )
        if (inner // mamba.head_dim) % mamba.n_groups:
            raise ConfigError(
                f"model.mamba.n_groups={mamba.n_groups} does not divide the {inner // mamba.head_dim} Mamba heads"
            )
        if mamba.conv_kernel > 4 or mamba.conv_kernel < 2:
            raise ConfigError(f"model.mamba.conv_kernel must be 2, 3 or 4, got {mamba.conv_kernel}")
    if "attention" in parts:
        heads = model.attention.num_heads
        _at_least("model.attention.num_heads", heads, 1)
        _at_least("model.attention.rope_base", model.attention.rope_base, 0, strict=True)
        if model.d_model % heads or (model.d_model // heads) % 2:
            raise ConfigError(f"model.attention.num_heads={heads}: d_model={model.d_model} must split into even heads")


def _validate_fusion(fusion: FusionConfig, model: ModelConfig) -> None:
    _one_of("fusion.branch_norm", fusion.branch_norm, ["none", "rms"])
    for key in ("gate_init", "weight_init"):
        value = getattr(fusion, key)
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"fusion.{key} must be strictly between 0 and 1, got {value}")
    if fusion.gain_init is not None and (len(fusion.gain_init) != 2 or not all(map(math.isfinite, fusion.gain_init))):
        raise ConfigError(f"fusion.gain_init must be two numbers (one a branch, finite), got {fusion.gain_init}")
    if fusion.proj_init is not None:
        _one_of("fusion.proj_init", fusion.proj_init, ["identity", "random"])
    for key in ("num_heads", "head_dim", "window"):
        if getattr(fusion, key) is not None:
            _at_least(f"fusion.{key}", getattr(fusion, key), 1)
    _one_of("fusion.name", fusion.name, group_options("fusion"))
    own = yaml.safe_load((CONF_DIR / "fusion" / f"{fusion.name}.yaml").read_text())
    for option in dataclasses.fields(fusion):
        given = getattr(fusion, option.name)
        if option.name not in own and given != option.default:
            raise ConfigError(f"fusion.{option.name}={given} has no effect with fusion={fusion.name}; leave it out")
        if option.name in own and given is None:
            raise ConfigError(f"fusion.{option.name} is not set; fusion={fusion.name} needs it")


def parse_count(key: str, value: Any) -> int | None:
    """``3500000``, ``3.5e6``, ``"3.5M"`` and ``"800K"`` as an integer; None stays None."""
    if value is None:
        return None
    text = str(value).strip()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1] if scale != 1 else text) * scale
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 1:
        raise ConfigError(f"{key} must be a number of parameters such as 3500000 or 3.5M, got '{value}'")
    return round(number)


def identity(cfg: Config) -> dict[str, Any]:
    """The part of a configuration that can change a result, as plain data: what ``run_id`` hashes."""
    from hybrid.gates import settings as gate_settings

    plain = to_plain(cfg)
    for dotted in NOT_IDENTITY:
        *parents, leaf = dotted.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent, {})
        node.pop(leaf, None)
    plain["gates"] = gate_settings.identity(plain["gates"])
    # Options of what the model does not have change nothing either.
    parts, model = used_parts(cfg.model), plain["model"]
    kernels = plain["kernels"]
    for part, section, key in (
        ("rwkv", model, "rwkv"), ("mamba", model, "mamba"), ("attention", model, "attention"),
        ("fusion", plain, "fusion"), ("fusion", model, "branches"), ("fusion", model, "branch_dropout"),
        ("rwkv", kernels, "wkv6"), ("mamba", kernels, "ssd"),
    ):  # fmt: skip
        if part not in parts:
            section.pop(key, None)
    plain["stopping"] = acting_rules(cfg)
    return plain


def to_plain(cfg: Config) -> dict[str, Any]:
    """Nested plain data without the options that are not set."""

    def drop_unset(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drop_unset(item) for key, item in value.items() if item is not None}
        return value

    return drop_unset(dataclasses.asdict(cfg))


def to_yaml(cfg: Config) -> str:
    return yaml.safe_dump(to_plain(cfg), sort_keys=False)


def from_yaml(path: Path | str) -> Config:
    """Read a run's ``config.yaml`` back. Raises ``ConfigError`` where it is missing or not one of ours."""
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds no configuration")
    return resolve(loaded)


def group_options(group: str) -> list[str]:
    """The choices of a configuration group: the names of its YAML files."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("[!_]*.yaml"))


@functools.cache
def default_options() -> dict[str, str | None]:
    """The configuration groups and what is chosen of each, in the order in which they are put together."""
    entries = OmegaConf.load(CONF_DIR / "config.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in entries if not isinstance(entry, str)]
    return {group: option for group, option in pairs if (CONF_DIR / group).is_dir()}


def schema_keys() -> list[str]:
    """Every key of the schema, dotted."""

    def walk(node: type, prefix: str) -> list[str]:
        keys = []
        hints = typing.get_type_hints(node)
        for option in dataclasses.fields(node):
            keys.append(prefix + option.name)
            if dataclasses.is_dataclass(hints[option.name]):
                keys += walk(hints[option.name], f"{prefix}{option.name}.")
        return keys

    return walk(Config, "")


def unknown_key(key: str) -> str:
    """The message for a key that a configuration does not have, with the nearest that it could."""
    known = schema_keys()
    if key == "sweep.arms":  # a mapping: an override adds to it
        return "arms are added one by one: '+sweep.arms.NAME=[\"fusion=gated\",...]'; sweep.only=[NAME,...] takes some"
    if key in known:
        return f"{key} has no effect with this choice of {key.split('.')[0]}; leave it out"
    leaf = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == leaf]  # the right name under the wrong parent
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; --help lists the keys")


def _one_of(key: str, value: str, options: list[str]) -> None:
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{key} must be one of {', '.join(options)}, got '{value}'{hint}")


def _at_least(key: str, value: float, least: float, strict: bool = False) -> None:
    if not math.isfinite(value) or value < least or (strict and value == least):
        raise ConfigError(f"{key} must be {'above' if strict else 'at least'} {least}, got {value}")
