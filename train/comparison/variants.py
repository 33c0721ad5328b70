"""Optimizers to compare: methods with settings of their own, and swept settings."""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, get_args, get_type_hints

import pydantic

from train.comparison.comparison_config import method_of
from train.config.methods import canonical, matrix_scale_field, settings_of
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import check_name

_TYPES = get_type_hints(OptimizerConfig)
_PARSER = pydantic.TypeAdapter(OptimizerConfig)


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own, at all rates that are searched."""

    label: str  # how it is written on the command line
    grid: tuple[OptimizerConfig, ...]  # with its settings, at each rate

    @functools.cached_property
    def searched(self) -> list[OptimizerConfig]:
        """The grid; settings without effect do not make another trial."""
        return [canonical(each) for each in self.grid]


class Sweep(NamedTuple):
    """One setting and its values as on the command line, and variants at each of them.

    A row begins with a variant as it is. Those whose method does not read the setting
    are so at each value.
    """

    name: str
    values: list[str]
    rows: list[list[Variant]]


def parse_variant(
    text: str,
    base: OptimizerConfig,
    learning_rates: Sequence[float],
    matrix_scales: Sequence[float],
) -> Variant:
    """Parses a variant, such as galore or subtrack:update_interval=50,scale=0.5.

    Its own settings are not searched; all others are those of `base`.

    Raises:
      ValueError: unknown method or setting, a setting that the method does not read,
        or a value that does not fit.
    """
    where = f"--optimizers {text!r}"
    name, rest = method_of(text)
    parts = [_assignment(part, where) for part in rest.split(",") if part.strip()]
    settings = dict(parts)
    if len(settings) < len(parts):
        raise ValueError(f"{where}: a setting is given twice")
    rates = ("learning_rate", matrix_scale_field(name))
    searched = (
        replace(base, name=name, **dict(zip(rates, values, strict=True)))
        for values in itertools.product(learning_rates, matrix_scales)
    )
    grid = _with_settings(searched, where, settings)
    used = settings_of(grid[0])
    if unused := [key for key in settings if key not in used]:
        raise ValueError(
            f"{where}: {name} does not use {unused[0]}; it uses "
            f"{', '.join(sorted(used))}"
        )
    return Variant(text.strip(), grid)


def parse_sweep(text: str, variants: Sequence[Variant]) -> Sweep:
    """Parses a sweep, such as rank=16,32,64, over the variants that read the setting.

    Raises:
      ValueError: no variant reads the setting, or a value does not fit.
    """
    where = f"--sweep {text!r}"
    name, joined = _assignment(text, where)
    values = [each.strip() for each in joined.split(",")]
    if len(set(values)) < len(values):
        raise ValueError(f"{where} has a value twice")
    if not any(name in settings_of(each.grid[0]) for each in variants):
        raise ValueError(f"{where}: none of --optimizers uses {name}")

    def at(value: str, variant: Variant) -> Variant:
        if name not in settings_of(variant.grid[0]):
            return variant
        grid = _with_settings(variant.grid, where, {name: value})
        return Variant(f"{variant.label} {name}={value}", grid)

    rows = [[each, *(at(value, each) for value in values)] for each in variants]
    return Sweep(name, values, rows)


def _assignment(text: str, where: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not value:
        raise ValueError(f"{where}: {text!r} is not a setting; write rank=32")
    check_name(where, name, [field for field in _TYPES if field != "name"])
    return name, value


def _with_settings(
    grid: Iterable[OptimizerConfig], where: str, settings: Mapping[str, str]
) -> tuple[OptimizerConfig, ...]:
    """Replaces settings by those parsed from text, `none` being None.

    Each config is in the result once: a given rate replaces all that are searched.
    """
    can_be_none = [name for name in settings if type(None) in get_args(_TYPES[name])]
    given = dict(settings) | {x: None for x in can_be_none if settings[x] == "none"}
    try:
        parsed = map(_PARSER.validate_python, (asdict(x) | given for x in grid))
        return tuple(dict.fromkeys(parsed))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a check of the full config, which names the flag
            raise ValueError(f"{where}: {first['ctx']['error']}") from error
        assigned = f"{first['loc'][0]}={first['input']}"
        raise ValueError(f"{where}: {assigned}: {first['msg']}") from error
