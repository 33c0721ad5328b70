"""Memory of the host that compilers have freed, given back to the system."""

import ctypes
import functools
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
# Little programs leave little, and there are many of them.
SHORTEST_SECONDS = 0.5


def return_what_compilers_free() -> None:
    """Makes each long compilation end with its memory given back.

    The C library keeps what was freed, between what is still in use: a fifth of the
    most that the default run ever takes, and half of what it keeps while it trains.
    """
    if hasattr(_c_library(), "malloc_trim"):  # as glibc has
        jax.monitoring.register_event_duration_secs_listener(_after)


def _after(event: str, seconds: float, **_: Any) -> None:
    if event == COMPILED and seconds >= SHORTEST_SECONDS:
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
