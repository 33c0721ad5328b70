"""Out-of-memory errors in one line; memory freed by compilers is returned."""

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
# Shorter compilations free too little to be worth a call.
SHORTEST_SECONDS = 0.5
_ADVICE = (
    "make the model smaller, split it over more devices (--mesh), or use a smaller "
    "--rank"
)


def check(state: Any) -> None:
    """Raises a MemoryError if a training state does not fit the devices' memory.

    Args:
      state: tree of shapes, dtypes and shardings.
    """
    leaves = jax.tree.leaves(state)
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
    )
    device, where = jax.local_devices()[0], "a device"
    present = (device.memory_stats() or {}).get("bytes_limit")
    if device.platform == "cpu":  # all devices share the host's memory
        needed, where = needed * jax.local_device_count(), "this host"
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if present is not None and needed > present:
        raise MemoryError(
            f"parameters and optimizer state take {needed / 1e9:,.1f} GB on {where}, "
            f"which has {present / 1e9:,.1f}: {_ADVICE}"
        )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Converts a device's out-of-memory error to a MemoryError of one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
        raise MemoryError(
            f"a device has too little memory ({reason}): split the step "
            "(--gradient-accumulation-steps), keep fewer activations (--remat full, a "
            f"smaller --batch-size-sequences), or {_ADVICE}"
        ) from error


def trim_after_compilations() -> None:
    """Returns memory freed by each long compilation to the system (malloc_trim).

    Otherwise glibc keeps it: a fifth of the peak memory of the default run, and half
    of its memory while training.
    """
    if hasattr(_c_library(), "malloc_trim"):  # glibc only
        jax.monitoring.register_event_duration_secs_listener(_after)


def _after(event: str, seconds: float, **_: Any) -> None:
    if event == COMPILED and seconds >= SHORTEST_SECONDS:
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
