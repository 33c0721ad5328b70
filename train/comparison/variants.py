"""Optimizers to compare: methods with settings of their own, and swept settings."""

import dataclasses
import functools
import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic

from train.comparison.comparison_config import method_of
from train.config.methods import canonical, matrix_scale_field, settings_of
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import check_name

_TYPES = typing.get_type_hints(OptimizerConfig)
_PARSER = pydantic.TypeAdapter(OptimizerConfig)


@dataclasses.dataclass(frozen=True)
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
    settings = {"name": name} | dict(parts)
    if len(settings) <= len(parts):
        raise ValueError(f"{where}: a setting is given twice")
    rates = ("learning_rate", matrix_scale_field(name))
    grid = _grid(
        _with_settings(base, where, dict(zip(rates, values, strict=True)) | settings)
        for values in itertools.product(learning_rates, matrix_scales)
    )
    used = settings_of(grid[0])
    if unused := [key for key, _ in parts if key not in used]:
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
        forms = (_with_settings(each, where, {name: value}) for each in variant.grid)
        return Variant(f"{variant.label} {name}={value}", _grid(forms))

    rows = [[each, *(at(value, each) for value in values)] for each in variants]
    return Sweep(name, values, rows)


def _grid(configs: Iterable[OptimizerConfig]) -> tuple[OptimizerConfig, ...]:
    """Distinct configs: a setting that is given replaces all rates of its name."""
    return tuple(dict.fromkeys(configs))


def _assignment(text: str, where: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not value:
        raise ValueError(f"{where}: {text!r} is not a setting; write rank=32")
    check_name(where, name, [field for field in _TYPES if field != "name"])
    return name, value


def _with_settings(
    base: OptimizerConfig, where: str, settings: Mapping[str, Any]
) -> OptimizerConfig:
    """The config with some settings parsed from text, `none` being None."""
    values = dataclasses.asdict(base)
    for name, value in settings.items():
        is_none = value == "none" and type(None) in typing.get_args(_TYPES[name])
        values[name] = None if is_none else value
    try:
        return _PARSER.validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # a check of the full config, which names the flag
            raise ValueError(f"{where}: {first['ctx']['error']}") from error
        assigned = f"{first['loc'][0]}={first['input']}"
        raise ValueError(f"{where}: {assigned}: {first['msg']}") from error
