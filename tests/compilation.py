"""Compiles quickly rather than well: tests run each program a few times only."""

import contextlib
import mmap
import os
import pathlib
from collections.abc import Iterator

import jax
import jaxlib

# A third less time for a compilation, where XLA still has its older CPU emitters.
_FLAG = "xla_cpu_use_fusion_emitters"
_DISABLE = "jax_disable_most_optimizations"


def make_quick() -> None:
    """Sets what this process and those that it starts compile with.

    Before JAX starts its backend, which reads the flags once.
    """
    jax.config.update(_DISABLE, True)
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags and _has_flag():
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=false"


def _has_flag() -> bool:
    """Whether this XLA knows the flag; it ends the process at one it does not."""
    for path in pathlib.Path(jaxlib.__file__).parent.glob("libjax_common*"):
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(_FLAG.encode()) >= 0
    return False


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Optimizes as for users: for tests of compiled programs."""
    jax.config.update(_DISABLE, False)
    try:
        yield
    finally:
        jax.config.update(_DISABLE, True)
