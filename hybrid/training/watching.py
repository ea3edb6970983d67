"""What looks at a run while it trains, and may act: the gates and the stopping rules.

A watcher sees every row of the run's record in order, and the run's facts before the first; it knows nothing of models
or devices, so it can be tried on any series of rows. A new one is a class in ``build_watchers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid.schema import Config

RATIO_WINDOW = 10  # logged steps behind the gradient ratio of summary and gate
RED_FLAG = "red flag"  # begins the news that a person should see at once
SETTLING = 100  # steps that a branch that starts at zero has at least, however short the warm-up


@dataclass(frozen=True)
class Action:
    """What a watcher asks for: the end of the run, or with ``lr_factor`` so many times the present learning rate."""

    reason: str
    lr_factor: float | None = None


class Watcher:
    """Base of all watchers. ``state`` is what it remembers: plain JSON values, part of the run's checkpoints."""

    name: str
    needs_probe = False  # whether it reads rows of kind probe, which cost a forward pass at every evaluation

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def begin(self, environment: dict[str, Any]) -> Action | None:
        """Before the first row of a run that is not resumed; ``environment`` is the record's.

        A run whose end is asked for here is evaluated at step 0 and takes no step.
        """
        return None

    def see(self, row: dict[str, Any]) -> Action | None:
        """A row of the record: ``kind`` is train, eval or probe."""
        return None

    def summary(self) -> dict[str, Any]:
        """What the run's summary says of it, by the summary's keys."""
        return {}

    def news(self) -> list[str]:
        """What the last row changed, a line each, for the log and the person who watches: red after ``RED_FLAG``."""
        return []


def settled_after(cfg: Config) -> int:
    """The last step at which a branch may still be waking up.

    With the official initialisation RWKV-6's output, and with it most of its gradient, is exactly zero at step 0.
    """
    return max(SETTLING, cfg.schedule.warmup_steps)


def build_watchers(cfg: Config) -> list[Watcher]:
    """The watchers that the configuration asks for."""
    from hybrid.gates.watching import GateWatcher
    from hybrid.stopping.watcher import StoppingRules  # both are watchers themselves

    return [*([GateWatcher(cfg)] if cfg.gates.enabled else []), StoppingRules(cfg)]
