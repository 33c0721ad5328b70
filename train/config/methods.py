"""Which settings each optimizer reads, and the defaults of those not given.

Defaults are read from the library's own signatures.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import optax

import subtrack_jax as stj
from subtrack_jax.optimizers.iterative_trackers import PROJECTION_LEARNING_RATE
from train.config.optimizer_config import (
    DECAY_FRACTION,
    WARMUP_FRACTION,
    OptimizerConfig,
)
from train.config.rules import flag


class Method(NamedTuple):
    """A low-rank method.

    Attributes:
      alias: the library's function, whose defaults are the method's.
      tracker: given the steps of a run; None for methods without a basis, which the
        alias makes.
      transport: which moments turn with the basis.
      fixed: settings of the alias that a run leaves at their defaults.
    """

    alias: Callable[..., optax.GradientTransformation]
    tracker: Callable[[OptimizerConfig, int], stj.Tracker] | None
    transport: bool | Literal["momentum"]
    fixed: tuple[str, ...] = ()

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Defaults of the alias' arguments."""
        return _defaults(self.alias)

    @property
    def recovery(self) -> bool:
        """Whether what the subspace misses is added back."""
        return "recovery_scale" in self.parameters

    @property
    def feeds_back(self) -> bool:
        """Whether the tracker looks at the momentum."""
        return "error_feedback" in self.parameters


def _geodesic(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.geodesic(config.step_size, config.damping)


def _static(config: OptimizerConfig, steps: int) -> stj.Tracker:
    return _geodesic(config, steps)._replace(
        move=lambda gradient, basis, context: stj.Moved(basis)
    )


def _svd(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.svd("randomized", config.align)


def _svd_then_random(config: OptimizerConfig, steps: int) -> stj.Tracker:
    after_steps = round(config.random_after_fraction * steps)
    return stj.switch(stj.svd("randomized"), stj.random_jump(), after_steps)


def _power_iteration(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.power_iteration(config.rho, "randomized")


def _online_pca(config: OptimizerConfig, _: int) -> stj.Tracker:
    return stj.online_pca(optax.adam(config.projection_learning_rate), "randomized")


_EVERY_STEP = ("update_interval",)
_NEVER = ("update_interval", "step_size", "damping")
LOW_RANK = {
    "subtrack": Method(stj.subtrack, _geodesic, True),
    "subtrack-grad": Method(stj.subtrack_grad, _geodesic, False),
    "grass-walk": Method(
        stj.grass_walk, lambda config, _: stj.random_walk(config.angle), True
    ),
    "grass-jump": Method(stj.grass_jump, lambda *_: stj.random_jump(), True),
    "galore": Method(stj.galore, _svd, False),
    "fira": Method(stj.fira, _svd, False),
    "golore": Method(stj.golore, _svd_then_random, "momentum"),
    "static": Method(stj.subtrack, _static, True, fixed=_NEVER),
    "ldadam": Method(stj.ldadam, _power_iteration, True, fixed=_EVERY_STEP),
    "online-subspace-descent": Method(
        stj.online_subspace_descent, _online_pca, False, fixed=_EVERY_STEP
    ),
    "apollo": Method(stj.apollo, None, False),
    "apollo-mini": Method(stj.apollo_mini, None, False, fixed=("rank",)),
}
# Settings of a run by the argument of an alias, where names differ.
_RENAMED = {
    "random_after_steps": "random_after_fraction",
    "projection_optimizer": "projection_learning_rate",
}


def has_subspaces(name: str) -> bool:
    """Whether a method keeps a basis for each matrix."""
    return name in LOW_RANK and LOW_RANK[name].tracker is not None


def moves_on_every_step(name: str) -> bool:
    """Whether a method moves its subspaces on every step, whatever the interval."""
    return name in LOW_RANK and LOW_RANK[name].parameters["update_interval"] == 1


def matrix_scale_field(name: str) -> str:
    """The setting that scales a method's updates of matrices against all others."""
    return "scale" if has_subspaces(name) else "matrix_learning_rate_scale"


def settings_of(config: OptimizerConfig) -> frozenset[str]:
    """The fields of a config that its method reads, but for its name."""
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
    named = {_RENAMED.get(name, name) for name in method.parameters}
    settings |= (named & known) - set(method.fixed)
    if method.tracker is not None:
        settings.add("recovery")
        if config.name != "static":
            settings.add("transport")
        if method.recovery if config.recovery is None else config.recovery:
            settings.add("growth_limit")
        else:
            settings.discard("growth_limit")
    if config.step_size is not None:
        settings.discard("damping")
    return frozenset(settings)


def unused(config: OptimizerConfig, base: OptimizerConfig) -> list[str]:
    """What is given, being unlike the base, and not read: "--rank 8", for adamw."""
    read = settings_of(config) | {"name"}
    return [
        f"{flag(field.name)} {getattr(config, field.name)}"
        for field in dataclasses.fields(OptimizerConfig)
        if field.name not in read
        and getattr(config, field.name) != getattr(base, field.name)
    ]


def defaults_of(config: OptimizerConfig) -> dict[str, Any]:
    """The values of settings that are None because they are not given."""
    defaults: dict[str, Any] = {"warmup_fraction": WARMUP_FRACTION}
    if config.warmup_steps is not None:
        defaults = {}
    if config.schedule == "wsd":
        defaults["decay_fraction"] = DECAY_FRACTION
    method = LOW_RANK.get(config.name)
    if method is None:
        return defaults | _of_fields(optax.scale_by_adam)
    if method.tracker is not None:
        defaults |= _of_fields(stj.recover_and_scale)
        defaults |= {"transport": method.transport, "recovery": method.recovery}
    if "projection_optimizer" in method.parameters:
        defaults["projection_learning_rate"] = PROJECTION_LEARNING_RATE
    return defaults | _of_fields(method.alias)


def canonical(config: OptimizerConfig) -> OptimizerConfig:
    """The config of the same optimizer that all who mean it agree on.

    Settings that its method does not read have their defaults, and those that are as
    the method has them anyway are None.
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
    """The config with the method's own defaults in place of what is not given."""
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
    """Defaults of the arguments that a config can leave open."""
    fields = {each.name: each for each in dataclasses.fields(OptimizerConfig)}
    return {
        name: value
        for name, value in _defaults(function).items()
        if name in fields and fields[name].default is None
    }
