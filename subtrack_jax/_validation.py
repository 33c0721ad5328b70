"""One way to say that an argument is wrong."""

from collections.abc import Callable
from typing import Any

import jax


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
