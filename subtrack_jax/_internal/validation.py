"""Validation of hyper-parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_STEPS = 2**31 - 1  # step counts are int32


def check(
    name: str, value: Any, accept: Callable[[Any], Any], requirement: str
) -> None:
    """Raises ValueError unless a hyper-parameter is acceptable.

    Values that are being traced (`optax.inject_hyperparams` under `jit`) cannot
    be looked at and pass.
    """
    if isinstance(value, jax.core.Tracer):
        return
    try:
        accepted = bool(accept(value))
    except (TypeError, ValueError, OverflowError):
        accepted = False
    if not accepted:
        raise ValueError(f"{name}={value!r}: must be {requirement}.")


def check_factor(name: str, value: Any) -> None:
    """Raises ValueError unless a factor or a rate is finite and not negative."""
    check(name, value, lambda x: 0 <= x < float("inf"), "a finite number, 0 or above")


def check_steps(name: str, value: Any, least: int = 0) -> None:
    """Raises ValueError unless a value is a number of steps that int32 holds."""
    check(
        name,
        value,
        lambda x: least <= x <= MOST_STEPS and x == int(x),
        f"an int >= {least} and <= {MOST_STEPS}",
    )


def check_precise(
    name: str,
    value: Any,
    accept: Callable[[Any], Any],
    requirement: str,
    usual: float,
) -> None:
    """`check` for numbers that 16 bits would round to 1 or 0.

    A dtype is known of traced values too.

    Args:
      name: name of the hyper-parameter.
      value: a number or an array.
      accept: whether a value is in range.
      requirement: the range in words.
      usual: a usual value, to show what becomes of it.
    """
    dtype = getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if is_float and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} is {dtype}, which rounds {usual} to"
            f" {float(np.asarray(usual, dtype)):g}. optax.inject_hyperparams gives"
            " hyper-parameters the dtype of the parameters: pass it"
            " hyperparam_dtype=jnp.float32."
        )
    check(name, value, accept, requirement)


def check_decay(name: str, value: Any, usual: float) -> None:
    """`check_precise` for the decay of an average."""
    check_precise(name, value, lambda x: 0 <= x < 1, "in [0, 1)", usual)
