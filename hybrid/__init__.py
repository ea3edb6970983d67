"""GroundThink: small language models whose blocks run RWKV-6 and Mamba-2 in parallel, and how to train them.

Importing this package is cheap; torch and the layers are imported when a model is first built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid.model import HybridLM
    from hybrid.schema import Config

__version__ = "0.1.0"


def build_model(cfg: Config) -> HybridLM:
    """A freshly initialised model for a checked configuration (``hybrid.config.resolve``), on the CPU.

    Raises ``hybrid.config.ConfigError`` where ``model.vocab_size`` is not set or ``model.target_params`` cannot be
    met.
    """
    from hybrid.model import HybridLM

    return HybridLM(cfg)
