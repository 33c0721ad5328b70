"""Memory: a lack of it told in one line, and what compilers freed given back."""

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
# Little programs leave little, and there are many of them.
SHORTEST_SECONDS = 0.5
_ADVICE = (
    "make the model smaller, share it among more devices (--mesh), or take a smaller "
    "--rank"
)


def check(state: Any) -> None:
    """Raises a MemoryError if a state alone is larger than the devices' memory.

    Args:
      state: shapes, dtypes and shardings of its arrays.
    """
    leaves = jax.tree.leaves(state)
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
    )
    device, where = jax.local_devices()[0], "a device"
    present = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":  # devices that share the memory of the host
        needed, where = needed * jax.local_device_count(), "this host"
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if present is not None and needed > present:
        raise MemoryError(
            f"parameters and optimizer state take {needed / 1e9:,.1f} GB on {where}, "
            f"which has {present / 1e9:,.1f}: {_ADVICE}"
        )


@contextlib.contextmanager
def shortage() -> Iterator[None]:
    """Raises a MemoryError of one line where a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
        raise MemoryError(
            f"a device has too little memory ({reason}): compute a step in more parts "
            "(--gradient-accumulation-steps), less at once (--remat full, "
            f"--batch-size-sequences), or {_ADVICE}"
        ) from error


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
