"""How a JSON file is read that somebody else wrote: nothing in it can raise an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def load_object(path: Path) -> dict[str, Any] | str:
    """The JSON object in a file, or a sentence that says what is wrong with it."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return f"{path.name} is not valid JSON ({str(error).splitlines()[0][:120]})"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return content if isinstance(content, dict) else f"{path.name} holds a {type(content).__name__}, not an object"


def number(value: Any) -> float:
    """``value`` as a finite float, else NaN (null, text, booleans, infinities)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        value = float(value)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def whole(value: Any) -> int | None:
    """``value`` as an int if it is a whole number, else None."""
    value = number(value)
    return int(value) if value == value and value == int(value) else None
