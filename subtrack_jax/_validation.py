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
