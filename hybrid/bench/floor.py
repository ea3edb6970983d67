"""The memory traffic that a training step cannot avoid, for "how far from the hardware". Imports no torch.

Counted once each: an activation that the backward pass needs is written in the forward pass and read in the backward
pass; gradients of activations stay on the chip; every parameter is read in both passes, its gradient written, and
AdamW reads weight, gradient and two moments and writes three of them back. Arithmetic, launches and whatever a kernel
spills are not in it, so a real step can only be slower.
"""

from __future__ import annotations

from hybrid.pattern import branches_of
from hybrid.schema import Config
from hybrid.sizes import count_params, ffn_hidden, vocab_size

ADAMW = 4 * (4 + 3)  # bytes a parameter: four float32 read, three written
FORMULA = (
    "2 (write, read) x bytes of the activations that backward needs (tokens x numbers a token x 4 or 2 bytes; step "
    "sizes 4) + parameters x (28 AdamW + 4 gradient + 2 reads in the compute type, with bfloat16 one cast)"
)


def activation_bytes_per_token(cfg: Config) -> int:
    """Bytes of the activations of one token that the backward pass needs."""
    model, d, hidden = cfg.model, cfg.model.d_model, ffn_hidden(cfg)
    low = 2 if cfg.trainer.dtype == "bfloat16" else 4
    rwkv, mamba = model.rwkv, model.mamba
    key, value, inner = d * rwkv.expand_k, d * rwkv.expand_v, mamba.expand * d
    conv = inner + 2 * mamba.n_groups * mamba.state_size
    size = {
        # Five shifted inputs and their low-rank mix, r, k and decay, v and gate, o, gated o, output.
        "rwkv": low * (5 * d + 5 * rwkv.shift_low_rank + rwkv.decay_low_rank + 3 * key + 4 * value + d),
        # z, channels before and after the convolution, y, gated y, output; the step sizes in float32.
        "mamba": low * (3 * inner + 2 * conv + d) + 4 * inner // mamba.head_dim,
        "attention": low * 5 * d,  # q, k, v, attended, output
    }
    total = low * (2 * d + vocab_size(cfg))  # embedding, last norm, logits
    for branches in branches_of(model.pattern, model.branches):
        total += sum(size[branch] for branch in branches) + low * d * (len(branches) == 2)
        total += low * (4 * d + 2 * hidden)  # two norms, two residual sums, the feed-forward layer
    return round(total)


def necessary_bytes(cfg: Config, members: int = 1) -> int:
    """Bytes that one step of ``members`` runs must move (``FORMULA``). Needs ``trainer.dtype`` settled."""
    tokens = cfg.trainer.batch_size * cfg.trainer.grad_accum * cfg.data.seq_len
    casts = 3 * 2 if cfg.trainer.dtype == "bfloat16" else 2 * 4
    return members * (2 * tokens * activation_bytes_per_token(cfg) + count_params(cfg)["total"] * (ADAMW + 4 + casts))
