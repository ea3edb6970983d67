"""TensorBoard as a second reader of the logged rows (``trainer.tensorboard=true``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid.config import ConfigError


class Board:
    """Writes every number of a logged row as a scalar ``kind/name`` at the row's step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("trainer.tensorboard=true needs tensorboard: pip install tensorboard") from error
        # Steps that an interrupted run had written beyond its checkpoint are hidden.
        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name in ("kind", "step"):
                continue
            values = value if isinstance(value, list) else [value]
            for index, number in enumerate(values):
                if isinstance(number, int | float):
                    label = f"{name}/{index}" if isinstance(value, list) else name
                    self.writer.add_scalar(f"{row['kind']}/{label}", number, row["step"])

    def close(self) -> None:
        self.writer.close()
