"""Settings that each optimizer reads, and their defaults.

Defaults are read from the library's own signatures.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import optax

import subtrack_jax as stj
from subtrack_jax.optimizers import FAMILY, Method
from subtrack_jax.optimizers.method import SharedRecovering, low_rank_method
from subtrack_jax.optimizers.online_subspace_descent import PROJECTION_LEARNING_RATE
from train.config.optimizer_config import (
    DECAY_FRACTION,
    WARMUP_FRACTION,
    OptimizerConfig,
)
from train.config.rules import flag

_NEVER = 2**31 - 1  # the longest interval
_OWN: dict[str, Method] = {}


@low_rank_method(
    transport=True, recovery="columns", update_interval=_NEVER, family=_OWN
)
def static(
    learning_rate: optax.ScalarOrSchedule, **shared: Unpack[SharedRecovering]
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++ with constant subspaces."""
    stay = lambda gradient, basis, context: stj.Moved(basis)
    tracker = stj.geodesic()._replace(move=stay)
    return stj.adam_in_subspace(learning_rate, tracker, **shared)


LOW_RANK = {name.replace("_", "-"): method for name, method in (FAMILY | _OWN).items()}
# Arguments of methods and their fields in a config, if the names differ.
_RENAMED = {
    "random_after_steps": "random_after_fraction",
    "projection_optimizer": "projection_learning_rate",
}


def fixed(method: Method) -> frozenset[str]:
    """Arguments that a run must not set, because their defaults define the method."""
    shared = _defaults(stj.adam_in_subspace)
    names = ("rank", "update_interval")
    return frozenset(name for name in names if method.defaults[name] != shared[name])


def has_subspaces(name: str) -> bool:
    """Whether a method keeps a basis for each matrix."""
    return name in LOW_RANK and LOW_RANK[name].recovery is not None


def moves_on_every_step(name: str) -> bool:
    """Whether a method moves its subspaces in every step, ignoring the interval."""
    return name in LOW_RANK and LOW_RANK[name].defaults["update_interval"] == 1


def matrix_scale_field(name: str) -> str:
    """Name of the setting that scales a method's updates of matrices."""
    return "scale" if has_subspaces(name) else "matrix_learning_rate_scale"


def settings_of(config: OptimizerConfig) -> frozenset[str]:
    """Fields of a config that its method reads, without the name."""
    settings = {
        *("learning_rate", "schedule", "warmup_steps", "warmup_fraction"),
        *("b1", "b2", "eps", "weight_decay", "max_gradient_norm"),
        "matrix_learning_rate_scale",
    }
    if config.schedule != "constant":
        settings.add("final_learning_rate_fraction")
    if config.schedule == "wsd":
        settings.add("decay_fraction")
    method = LOW_RANK.get(config.name)
    if method is None:
        return frozenset(settings)
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    named = {_RENAMED.get(name, name) for name in method.defaults}
    settings |= (named & known) - fixed(method)
    if method.recovery is not None:
        settings.add("recovery")
        if method.defaults["update_interval"] != _NEVER:
            settings.add("transport")
        recovers = method.recovery == "columns"
        if recovers if config.recovery is None else config.recovery:
            settings.add("growth_limit")
        else:
            settings.discard("growth_limit")
    if config.step_size is not None:
        settings.discard("damping")
    return frozenset(settings)


def unused(config: OptimizerConfig, base: OptimizerConfig) -> list[str]:
    """Given settings that the method does not read: "--rank 8" for adamw."""
    read = settings_of(config) | {"name"}
    return [
        f"{flag(field.name)} {getattr(config, field.name)}"
        for field in dataclasses.fields(OptimizerConfig)
        if field.name not in read
        and getattr(config, field.name) != getattr(base, field.name)
    ]


def defaults_of(config: OptimizerConfig) -> dict[str, Any]:
    """Default values of settings that are None."""
    defaults: dict[str, Any] = {"warmup_fraction": WARMUP_FRACTION}
    if config.warmup_steps is not None:
        defaults = {}
    if config.schedule == "wsd":
        defaults["decay_fraction"] = DECAY_FRACTION
    method = LOW_RANK.get(config.name)
    if method is None:
        return defaults | _of_fields(optax.scale_by_adam)
    if method.recovery is not None:
        defaults |= _of_fields(stj.recover_and_scale)
        recovers = method.recovery == "columns"
        defaults |= {"transport": method.transport, "recovery": recovers}
    if "projection_optimizer" in method.defaults:
        defaults["projection_learning_rate"] = PROJECTION_LEARNING_RATE
    return defaults | _of_fields(method.optimizer)


def canonical(config: OptimizerConfig) -> OptimizerConfig:
    """Canonical config of an optimizer, equal for equivalent settings.

    Settings that the method does not read are reset; explicit defaults become None.
    """
    read, defaults = settings_of(config) | {"name"}, defaults_of(config)
    if config.mu_dtype == "int8":
        config = dataclasses.replace(config, mu_dtype=None, moments_dtype="int8")
    changed = {}
    for field in dataclasses.fields(config):
        is_default = getattr(config, field.name) == defaults.get(field.name)
        if field.name not in read or (field.default is None and is_default):
            changed[field.name] = field.default
    return dataclasses.replace(config, **changed)


def resolved(config: OptimizerConfig) -> OptimizerConfig:
    """Fills in the method's own defaults for settings that are None."""
    config, defaults = canonical(config), defaults_of(config)
    missing = {
        name: value for name, value in defaults.items() if getattr(config, name) is None
    }
    return dataclasses.replace(config, **missing)


@functools.cache
def _defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {
        each.name: each.default for each in parameters if each.default is not each.empty
    }


def _of_fields(function: Callable[..., Any]) -> dict[str, Any]:
    """Defaults of the method's arguments that a config can set."""
    fields = {each.name: each for each in dataclasses.fields(OptimizerConfig)}
    return {
        name: value
        for name, value in _defaults(function).items()
        if name in fields and fields[name].default is None
    }
