"""Hyper-parameters as arrays, for `optax.inject_hyperparams`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from subtrack_jax._internal.trees import is_hashable, is_traceable

Factory = TypeVar("Factory", bound=Callable[..., optax.GradientTransformationExtraArgs])


def with_values_as_operands(factory: Factory) -> Factory:
    """Caches compiled updates across rebuilds of an optimizer.

    `optax.inject_hyperparams` calls the function of an optimizer on every step, with
    new values. Constants of an un-jitted update, they would be compiled in each time;
    here they are operands of a program that is kept by the other arguments.

    Args:
      factory: builds an optimizer from hyper-parameters.

    Returns:
      The same function, with its name, documentation and signature.
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        optimizer = factory(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        values = {k: x for k, x in arguments.items() if isinstance(x, jax.Array)}
        others = tuple(item for item in arguments.items() if item[0] not in values)

        def update(updates, state, params=None, **extra_args):
            operands = (updates, state, params), values, extra_args
            if _is_traced(operands) or not is_traceable(extra_args):
                return optimizer.update(updates, state, params, **extra_args)
            return _update(factory, others, *operands)

        if not values or not is_hashable(others):
            return optimizer
        return optax.GradientTransformationExtraArgs(optimizer.init, update)

    return build  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _update(factory, others, arguments, values, extra_args):
    return factory(**dict(others), **values).update(*arguments, **extra_args)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
