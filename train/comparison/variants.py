"""Variants to compare: methods with settings of their own, and their trials."""

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic

from train.comparison.comparison_config import method_of
from train.config.methods import canonical, matrix_scale_field, resolved, settings_of
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import check_name

_TYPES = typing.get_type_hints(OptimizerConfig)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of a comparison.

    Attributes:
      optimizer: the method and all its settings, as `canonical` gives them.
      seed: of initial parameters, order of the data and random subspaces.
    """

    optimizer: OptimizerConfig
    seed: int

    @property
    def matrix_scale(self) -> float:
        """The method's factor on matrices, under whichever name it has it."""
        field = matrix_scale_field(self.optimizer.name)
        return getattr(resolved(self.optimizer), field)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with settings of its own, whose two rates are yet to be chosen.

    Attributes:
      label: how it is written on the command line.
      optimizer: the method and its settings.
      fixed: the settings that the label names, which are not searched.
    """

    label: str
    optimizer: OptimizerConfig
    fixed: frozenset[str] = frozenset()

    def with_setting(self, name: str, value: Any) -> "Variant":
        """The variant with one more setting, or another value of it."""
        return Variant(
            f"{self.label} {name}={word(value)}",
            dataclasses.replace(self.optimizer, **{name: value}),
            self.fixed | {name},
        )

    def search(
        self, learning_rates: Sequence[float], matrix_scales: Sequence[float]
    ) -> list[OptimizerConfig]:
        """All that is tried of it: each learning rate with each factor on matrices."""
        tried = {
            "learning_rate": learning_rates,
            matrix_scale_field(self.optimizer.name): matrix_scales,
        }
        free = {name: tried[name] for name in tried if name not in self.fixed}
        chosen = (
            dict(zip(free, values, strict=True))
            for values in itertools.product(*free.values())
        )
        # Settings that make no difference shall not make another trial.
        return [
            canonical(dataclasses.replace(self.optimizer, **values))
            for values in chosen
        ]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One setting and the values it takes, all else being equal."""

    name: str
    values: tuple[Any, ...]

    def variants(self, variant: Variant) -> dict[Any, Variant]:
        """The variant at each value; itself where its method has no such setting."""
        return {
            value: variant.with_setting(self.name, value)
            if self.name in settings_of(variant.optimizer)
            else variant
            for value in self.values
        }


def parse_variant(text: str, base: OptimizerConfig) -> Variant:
    """Reads a variant: galore, or subtrack:update_interval=50,scale=0.5.

    Args:
      text: a method's name and, behind a colon, settings of it with commas.
      base: all other settings.

    Raises:
      ValueError: there is no such method or setting, the method does not read the
        setting, or the value is not one of it.
    """
    where = f"--optimizers {text!r}"
    name, rest = method_of(text)
    settings = {}
    for part in filter(None, map(str.strip, rest.split(","))):
        key, value = _assignment(part, where)
        if key in settings:
            raise ValueError(f"{where}: {key} is given twice")
        settings[key] = _value(key, value, where)
    optimizer = _replace(base, where, name=name, **settings)
    for key in settings:
        if key not in settings_of(optimizer):
            raise ValueError(
                f"{where}: {name} does not use {key}; it uses "
                f"{', '.join(sorted(settings_of(optimizer)))}"
            )
    return Variant(text.strip(), optimizer, frozenset(settings))


def parse_sweep(text: str, variants: Sequence[Variant]) -> Sweep:
    """Reads a sweep: rank=16,32,64.

    Args:
      text: a setting and its values.
      variants: whose setting it is.

    Raises:
      ValueError: no variant has such a setting, or a value is not one of it.
    """
    where = f"--sweep {text!r}"
    name, values = _assignment(text.strip(), where)
    taken = tuple(_value(name, value.strip(), where) for value in values.split(","))
    if len(set(taken)) < len(taken):
        raise ValueError(f"{where} has a value twice")
    users = [v for v in variants if name in settings_of(v.optimizer)]
    if not users:
        raise ValueError(f"{where}: none of --optimizers uses {name}")
    for variant, value in itertools.product(users, taken):
        _replace(variant.optimizer, where, **{name: value})
    return Sweep(name, taken)


def all_variants(
    variants: Sequence[Variant], sweeps: Sequence[Sweep]
) -> Iterator[Variant]:
    """The variants as they are, then those that differ in a swept setting."""
    yield from variants
    for sweep, variant in itertools.product(sweeps, variants):
        yield from sweep.variants(variant).values()


def _assignment(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not value.strip():
        raise ValueError(f"{where}: {text!r} is not a setting; write rank=32")
    known = [field for field in _TYPES if field != "name"]
    check_name(where, name, known)
    return name, value.strip()


def _value(name: str, text: str, where: str) -> Any:
    kind = _TYPES[name]
    try:
        return pydantic.TypeAdapter(kind).validate_python(text)
    except pydantic.ValidationError as error:
        if text == "none" and type(None) in typing.get_args(kind):
            return None
        message = error.errors()[0]["msg"]
        raise ValueError(f"{where}: {name}={text}: {message}") from error


def _replace(base: OptimizerConfig, where: str, **settings: Any) -> OptimizerConfig:
    try:
        return dataclasses.replace(base, **settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or isinstance(value, str):
        return value or "none"
    return f"{value:g}"
