"""Optimizers to compare: methods with settings of their own, and swept settings."""

import dataclasses
import itertools
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import pydantic

from train.comparison.comparison_config import method_of
from train.config.methods import canonical, matrix_scale_field, resolved, settings_of
from train.config.optimizer_config import OptimizerConfig
from train.config.rules import check_name

_TYPES = typing.get_type_hints(OptimizerConfig)
_PARSER = pydantic.TypeAdapter(OptimizerConfig)


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
    """A method with settings of its own, whose two rates are searched.

    Attributes:
      label: how it is written on the command line.
      optimizer: the method and its settings.
      fixed: the settings that the label names, which are not searched.
    """

    label: str
    optimizer: OptimizerConfig
    fixed: frozenset[str] = frozenset()

    def search(
        self, learning_rates: Sequence[float], matrix_scales: Sequence[float]
    ) -> list[OptimizerConfig]:
        """Every learning rate with every factor on matrices, but for fixed ones."""
        tried = {
            "learning_rate": learning_rates,
            matrix_scale_field(self.optimizer.name): matrix_scales,
        }
        free = {name: tried[name] for name in tried if name not in self.fixed}
        # Canonical, so that settings without effect do not make another trial.
        settings = (
            dict(zip(free, chosen, strict=True))
            for chosen in itertools.product(*free.values())
        )
        return [
            canonical(dataclasses.replace(self.optimizer, **each)) for each in settings
        ]


class Sweep(NamedTuple):
    """One setting and its values, with each variant at each value.

    Variants whose method does not read the setting are in `rows` as they are.
    """

    name: str
    values: list[str]  # as on the command line
    rows: dict[Variant, list[Variant]]


def parse_variant(text: str, base: OptimizerConfig) -> Variant:
    """Parses a variant, such as galore or subtrack:update_interval=50,scale=0.5.

    All other settings are those of `base`.

    Raises:
      ValueError: unknown method or setting, a setting that the method does not read,
        or a value that does not fit.
    """
    where = f"--optimizers {text!r}"
    name, rest = method_of(text)
    settings: dict[str, str] = {}
    for part in filter(None, map(str.strip, rest.split(","))):
        key, value = _assignment(part, where)
        if key in settings:
            raise ValueError(f"{where}: {key} is given twice")
        settings[key] = value
    optimizer = _with_settings(base, where, name=name, **settings)
    used = settings_of(optimizer)
    for key in (key for key in settings if key not in used):
        raise ValueError(
            f"{where}: {name} does not use {key}; it uses {', '.join(sorted(used))}"
        )
    return Variant(text.strip(), optimizer, frozenset(settings))


def parse_sweep(text: str, variants: Sequence[Variant]) -> Sweep:
    """Parses a sweep, such as rank=16,32,64, over the variants that read the setting.

    Raises:
      ValueError: no variant reads the setting, or a value does not fit.
    """
    where = f"--sweep {text!r}"
    name, joined = _assignment(text.strip(), where)
    texts = [each.strip() for each in joined.split(",")]
    rows = {variant: [variant] * len(texts) for variant in variants}
    values: list[Any] = []
    for variant in variants:
        base = variant.optimizer
        if name not in settings_of(base):
            continue
        forms = [_with_settings(base, where, **{name: each}) for each in texts]
        values = [getattr(form, name) for form in forms]
        rows[variant] = [
            Variant(f"{variant.label} {name}={word}", form, variant.fixed | {name})
            for word, form in zip(map(_word, values), forms, strict=True)
        ]
    if not values:
        raise ValueError(f"{where}: none of --optimizers uses {name}")
    if len(set(values)) < len(values):
        raise ValueError(f"{where} has a value twice")
    return Sweep(name, list(map(_word, values)), rows)


def _assignment(text: str, where: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.replace("-", "_")
    if not equals or not value:
        raise ValueError(f"{where}: {text!r} is not a setting; write rank=32")
    check_name(where, name, [field for field in _TYPES if field != "name"])
    return name, value


def _with_settings(
    base: OptimizerConfig, where: str, **settings: str
) -> OptimizerConfig:
    """The config with some settings parsed from text, `none` being None."""
    values = dataclasses.asdict(base)
    for name, text in settings.items():
        is_none = text == "none" and type(None) in typing.get_args(_TYPES[name])
        values[name] = None if is_none else text
    try:
        return _PARSER.validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if first["loc"]:
            name = first["loc"][0]
            what = f"{name}={settings[name]}: {first['msg']}"
        else:  # of the full config, which names the flag itself
            what = first["ctx"]["error"]
        raise ValueError(f"{where}: {what}") from error


def _word(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or isinstance(value, str):
        return value or "none"
    return f"{value:g}"
