"""What a configuration weighs: parameters by part, recurrent state, arithmetic. Counted from the formulas of the
layers without building them (so without torch); a test holds the counts against built models.
"""

from __future__ import annotations

from hybrid.config import ConfigError
from hybrid.pattern import branches_of, parse_pattern
from hybrid.schema import Config, FusionConfig, MambaConfig, RWKVConfig

PARTS = ("total", "embedding", "rwkv", "mamba", "attention", "fusion", "ffn", "norm")

# Parameters of one fusion of two branches of width d.
FUSION_PARAMS = {
    "gain": lambda d, f: 2 * d,
    "weighted": lambda d, f: 1,
    "gated": lambda d, f: 2 * d + 1,
    "gated_channel": lambda d, f: (2 * d + 1) * d,
    "concat": lambda d, f: 2 * d * d,
    "residual": lambda d, f: d * d,
    "cross_attention": lambda d, f: 8 * d * f.num_heads * f.head_dim,
}


def rwkv_params(d: int, rwkv: RWKVConfig) -> int:
    """Parameters of one RWKV-6 time mixing (FLA's ``RWKV6Attention``)."""
    key, value = round(d * rwkv.expand_k), round(d * rwkv.expand_v)
    shift = 2 * d * 5 * rwkv.shift_low_rank + d + 5 * d
    decay = d * rwkv.decay_low_rank + rwkv.decay_low_rank * key + key
    return shift + decay + 2 * d * key + 3 * d * value + key + 2 * value


def mamba_params(d: int, mamba: MambaConfig) -> int:
    """Parameters of one Mamba-2 mixer (FLA's ``Mamba2``)."""
    inner = mamba.expand * d
    heads = inner // mamba.head_dim
    conv = inner + 2 * mamba.n_groups * mamba.state_size
    return d * (inner + conv + heads) + conv * (mamba.conv_kernel + 1) + 3 * heads + inner + inner * d


def fusion_params(d: int, fusion: FusionConfig) -> int:
    return FUSION_PARAMS[fusion.name](d, fusion)


def ffn_hidden(cfg: Config) -> int:
    """Width of the feed-forward layer: given, a multiple of ``d_model``, or solved for ``model.target_params``.

    Raises ``ConfigError`` where no width of at least d_model/8 comes within 0.5% of the target.
    """
    model = cfg.model
    if model.ffn_hidden is not None:
        return model.ffn_hidden
    if model.target_params is None:
        return max(1, round(model.ffn_mult * model.d_model))
    per_unit = 2 * model.d_model * len(parse_pattern(model.pattern))
    rest = count_params(cfg, hidden=0)["total"]
    hidden = max(1, round((model.target_params - rest) / per_unit))
    reached = rest + hidden * per_unit
    too_thin = hidden < model.d_model // 8  # a layer for the count's sake only
    if too_thin or abs(reached - model.target_params) > 0.005 * model.target_params:
        raise ConfigError(
            f"model.target_params={model.target_params:,} cannot be met within 0.5% with feed-forward layers at least "
            f"{model.d_model // 8} wide: without them the model has {rest:,} parameters and one unit of width adds "
            f"{per_unit:,}; change the target, model.d_model or model.pattern"
        )
    return hidden


def count_params(cfg: Config, hidden: int | None = None) -> dict[str, int]:
    """Trainable parameters by part; the tied head counts once, as embedding."""
    model, d = cfg.model, cfg.model.d_model
    hidden = ffn_hidden(cfg) if hidden is None else hidden
    size = {
        "rwkv": lambda: rwkv_params(d, model.rwkv),
        "mamba": lambda: mamba_params(d, model.mamba),
        "attention": lambda: 4 * d * d,
    }
    parts = dict.fromkeys(PARTS, 0)
    parts["embedding"] = vocab_size(cfg) * d
    parts["norm"] = d
    for branches in branches_of(model.pattern, model.branches):
        for branch in branches:
            parts[branch] += size[branch]()
        parts["fusion"] += fusion_params(d, cfg.fusion) if len(branches) == 2 else 0
        parts["ffn"] += 2 * d * hidden
        parts["norm"] += 2 * d
    parts["total"] = sum(parts.values())
    return parts


def state_floats_per_layer(cfg: Config) -> list[int]:
    """Numbers in the recurrent state of each block (RWKV-6: H*K*V, Mamba-2: H*P*N), the memory that recall lives in.

    Convolution and token-shift tails are left out; attention keeps the whole context and counts 0.
    """
    model, d = cfg.model, cfg.model.d_model
    size = {
        "rwkv": lambda: round(d * model.rwkv.expand_k) * round(d * model.rwkv.expand_v) // model.rwkv.num_heads,
        "mamba": lambda: model.mamba.expand * d * model.mamba.state_size,
        "attention": lambda: 0,
    }
    return [sum(size[branch]() for branch in branches) for branches in branches_of(model.pattern, model.branches)]


def flops_per_token(cfg: Config) -> int:
    """Training arithmetic per token: three times the forward pass.

    Forward: 2 per weight of every matrix product (the head included, the embedding look-up not), 5 per state element
    and step of a recurrence (decay, update, read-out) and, for attention, 4*d_model per attended position at the
    mean context (T+1)/2.
    """
    parts = count_params(cfg)
    model = cfg.model
    products = 2 * (parts["total"] - parts["norm"])
    recurrences = 5 * sum(state_floats_per_layer(cfg))
    blocks = parse_pattern(model.pattern)
    attention = blocks.count("A") * 4 * model.d_model * (cfg.data.seq_len + 1) / 2
    if cfg.fusion.name == "cross_attention":
        T = cfg.data.seq_len
        growing = min(cfg.fusion.window, T)  # positions whose window is not full yet
        attended = (growing * (growing + 1) / 2 + (T - growing) * cfg.fusion.window) / T
        attention += blocks.count("P") * 2 * 4 * cfg.fusion.num_heads * cfg.fusion.head_dim * attended
    return round(3 * (products + recurrences + attention))


def vocab_size(cfg: Config) -> int:
    """The number of token ids. Raises ``ConfigError`` where it is not known yet."""
    if cfg.model.vocab_size is None:
        raise ConfigError("model.vocab_size is not set; it comes from the data, or give a number")
    return cfg.model.vocab_size
