"""The space of a search: its dimensions in Optuna's terms, checked, and what a trial draws from them as overrides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, QuotedString, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from hybrid.config import CONF_DIR, ConfigError, schema_keys, unknown_key
from sweeps.expand import hydra_value

ARGUMENTS = {
    "float": ("low", "high", "step", "log"),
    "int": ("low", "high", "step", "log"),
    "categorical": ("choices",),
}
# What makes no arm: a search over it would compare what is not comparable, or nothing.
NOT_SEARCHABLE = (
    "sweep",
    "display",
    "data",
    "seed_init",
    "seed_data",
    "variant",
    "out",
    "sampler",
    "pruner",
    "kernels",
)


@dataclass(frozen=True)
class Dimension:
    """One key of the configuration, what it may be, and on which earlier values it depends."""

    key: str
    distribution: BaseDistribution
    when: dict[str, list[Any]]

    def applies(self, params: dict[str, Any]) -> bool:
        return all(key in params and params[key] in values for key, values in self.when.items())

    def describe(self) -> dict[str, Any]:
        """As it is written in YAML."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            told: dict[str, Any] = {"type": "categorical", "choices": list(d.choices)}
        else:
            assert isinstance(d, FloatDistribution | IntDistribution)
            told = {"type": "float" if isinstance(d, FloatDistribution) else "int", "low": d.low, "high": d.high}
            if d.log:
                told["log"] = True
            elif d.step is not None and (d.step != 1 or isinstance(d, FloatDistribution)):
                told["step"] = d.step
        return told | ({"when": self.when} if self.when else {})


class Space:
    """The dimensions of a search, in the order in which a trial draws them.

    A choice that is a list (``fusion.gain_init``) is known to Optuna by its text on Hydra's command line.
    """

    def __init__(self, described: dict[str, Any]) -> None:
        """Raises ``ConfigError`` for a description that is no space; the message names the key."""
        self.dimensions: list[Dimension] = []
        for key, given in described.items():
            self.dimensions.append(_dimension(key, given, {d.key: d for d in self.dimensions}))
        if not self.dimensions:
            raise ConfigError("sweep.search.space is empty: name what is searched, e.g. {optim.lr: {type: float, ...}}")

    def describe(self) -> dict[str, Any]:
        return {dimension.key: dimension.describe() for dimension in self.dimensions}

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """What the trial's sampler draws: key to value, without the dimensions whose condition does not hold."""
        params: dict[str, Any] = {}
        for dimension in self.dimensions:
            if not dimension.applies(params):
                continue
            d = dimension.distribution
            if isinstance(d, FloatDistribution):
                value: Any = trial.suggest_float(dimension.key, d.low, d.high, step=d.step, log=d.log)
            elif isinstance(d, IntDistribution):
                value = trial.suggest_int(dimension.key, d.low, d.high, step=d.step, log=d.log)
            else:
                assert isinstance(d, CategoricalDistribution)
                value = trial.suggest_categorical(dimension.key, d.choices)
            params[dimension.key] = value
        return params

    def overrides(self, params: dict[str, Any]) -> list[str]:
        """The parameters as lines for Hydra."""
        return [f"{key}={value if _is_list(value) else hydra_value(value)}" for key, value in params.items()]

    def corners(self) -> Iterator[dict[str, Any]]:
        """Parameters that show whether every end and every choice can be composed: all low, all high, each choice."""
        yield self._pick({}, first=True)
        yield self._pick({}, first=False)
        for dimension in self.dimensions:
            if isinstance(dimension.distribution, CategoricalDistribution):
                for choice in dimension.distribution.choices[1:-1]:
                    yield self._pick({dimension.key: choice}, first=True)

    def _pick(self, fixed: dict[str, Any], first: bool) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.applies(params):
                d = dimension.distribution
                ends = (d.choices[0], d.choices[-1]) if isinstance(d, CategoricalDistribution) else (d.low, d.high)
                params[dimension.key] = fixed.get(dimension.key, ends[0] if first else ends[1])
        return params

    def check_params(self, params: dict[str, Any], what: str) -> dict[str, Any]:
        """Parameters that a person names (``enqueue``). Raises ``ConfigError`` for one that the space does not have."""
        known = {dimension.key: dimension for dimension in self.dimensions}
        checked: dict[str, Any] = {}
        for key, value in params.items():
            if key not in known:
                raise ConfigError(f"{what}: {key} is no dimension of the space (there are {', '.join(known)})")
            value = hydra_value(value) if isinstance(value, list) else value
            d = known[key].distribution
            try:
                if isinstance(value, bool) and not isinstance(d, CategoricalDistribution):
                    raise TypeError
                inside = d._contains(d.to_internal_repr(value))
            except (TypeError, ValueError):
                inside = False
            if not inside:
                raise ConfigError(f"{what}: {key}={value} is outside its dimension {known[key].describe()}")
            checked[key] = value
        return checked


def from_command_line(override: Override) -> dict[str, Any] | None:
    """A sweep on Hydra's command line as a dimension: ``interval`` float, ``range`` int, a list of values categorical.

    ``tag(log, interval(1e-4,1e-2))`` is logarithmic, ``int(interval(1,9))`` whole. None for what is no sweep.
    """
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        kind = "int" if isinstance(low, int) and isinstance(high, int) else "float"
        return {"type": kind, "low": low, "high": high} | ({"log": True} if "log" in value.tags else {})
    if isinstance(value, RangeSweep):
        low, stop, step = value.start, value.stop, value.step
        whole = all(isinstance(x, int) for x in (low, stop, step))
        if not whole or step <= 0 or stop <= low:
            raise ConfigError(f"{override.input_line}: a range of a search goes up in whole steps; use interval")
        high = low + (stop - 1 - low) // step * step  # as in Python, the end is not part of it
        return {"type": "int", "low": low, "high": high} | ({"step": step} if step != 1 else {})
    if isinstance(value, ChoiceSweep):
        return {"type": "categorical", "choices": [x.text if isinstance(x, QuotedString) else x for x in value.list]}
    return None


def _dimension(key: str, given: Any, earlier: dict[str, Dimension]) -> Dimension:
    where = f"sweep.search.space.{key}"
    if not isinstance(key, str) or key.split(".")[0] in NOT_SEARCHABLE:
        raise ConfigError(f"{where}: {key} is not for a search")
    if key not in schema_keys() and not (CONF_DIR / key).is_dir():
        raise ConfigError(f"{where}: {unknown_key(key)}")
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must be a dimension such as {{type: float, low: 1e-4, high: 1e-2}}, got {given}")
    rest = dict(given)
    kind, when = rest.pop("type", None), rest.pop("when", None) or {}
    if kind not in ARGUMENTS:
        raise ConfigError(f"{where}.type must be one of {', '.join(ARGUMENTS)}, got {kind}")
    unknown = [name for name in rest if name not in ARGUMENTS[kind]]
    if unknown:
        raise ConfigError(
            f"{where}: no argument '{unknown[0]}' of {kind} (there are {', '.join(ARGUMENTS[kind])}, when)"
        )
    missing = [name for name in ARGUMENTS[kind] if name in ("low", "high", "choices") and name not in rest]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is not set")
    return Dimension(key, _distribution(where, kind, rest), _conditions(where, when, earlier))


def _distribution(where: str, kind: str, given: dict[str, Any]) -> BaseDistribution:
    if kind == "categorical":
        choices = given["choices"]
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}.choices must be a list of values, got {choices}")
        known = [hydra_value(choice) if isinstance(choice, list) else choice for choice in choices]
        if len({repr(choice) for choice in known}) < len(known):
            raise ConfigError(f"{where}.choices names a value twice: {known}")
        return CategoricalDistribution(known)
    if not isinstance(given.get("log", False), bool):
        raise ConfigError(f"{where}.log must be true or false, got {given['log']}")
    for name in ("low", "high", "step"):
        value = given.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and (not number or (kind == "int" and value != int(value))):
            raise ConfigError(f"{where}.{name} must be a {'whole ' if kind == 'int' else ''}number, got {value}")
    if given["low"] > given["high"]:
        raise ConfigError(f"{where}: low={given['low']} is above high={given['high']}")
    arguments = {name: value for name, value in given.items() if value is not None}
    try:
        if kind == "float":
            return FloatDistribution(**arguments)
        return IntDistribution(**{name: v if name == "log" else int(v) for name, v in arguments.items()})
    except ValueError as error:  # log with a step, log from 0 ...
        raise ConfigError(f"{where}: {error}") from error


def _conditions(where: str, when: Any, earlier: dict[str, Dimension]) -> dict[str, list[Any]]:
    if not isinstance(when, dict):
        raise ConfigError(f"{where}.when must be {{earlier key: value or list of values}}, got {when}")
    conditions = {}
    for key, values in when.items():
        if key not in earlier:
            raise ConfigError(f"{where}.when: {key} is no dimension above this one")
        d = earlier[key].distribution
        conditions[key] = values if isinstance(values, list) else [values]
        if not isinstance(d, CategoricalDistribution):
            raise ConfigError(f"{where}.when: {key} is not categorical")
        wrong = [value for value in conditions[key] if value not in d.choices]
        if wrong:
            raise ConfigError(
                f"{where}.when: {key} is never {wrong[0]} (its choices are {', '.join(map(str, d.choices))})"
            )
    return conditions


def _is_list(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("[") and value.endswith("]")
