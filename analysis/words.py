"""How numbers are written: signs, p-values, the names of metrics."""

from __future__ import annotations

METRIC_WORDS = {"best_val_loss": "best validation loss", "final_val_loss": "final validation loss"}


def signed(value: float, digits: int = 4) -> str:
    """``+0.0123``, with a true minus sign, and without one for what is 0 in that many digits."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def p_words(p: float) -> str:
    """``p = 0.012`` or ``p < 0.001``."""
    return f"p {p_number(p)}" if p < 0.001 else f"p = {p_number(p)}"


def p_number(p: float) -> str:
    """``0.012`` or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


PM = "\N{PLUS-MINUS SIGN}"
