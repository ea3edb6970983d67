"""The sequence mixers of a block: RWKV-6, Mamba-2, and causal attention as the control.

Each maps [B,T,d_model] to [B,T,d_model] and has the same interface: ``forward(x, state) -> (out, state)``, where
``state`` is None (from zero, none wanted back) or the dictionary of tensors that the last call returned;
``initial_state(batch)`` gives the one to begin with. ``only_linear`` says whether x goes into linear layers and nowhere
else: autocast takes it to lower precision in any case.
"""

from __future__ import annotations

from torch import Tensor

BranchState = dict[str, Tensor]
