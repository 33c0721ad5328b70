"""Compiles quickly rather than well: tests run each program a few times only."""

import contextlib
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator

import jax
import jaxlib

# Less time for a compilation: a third with XLA's older CPU emitters, while it has
# them, and a fifth with one LLVM module for each program.
_FLAGS = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
_DISABLE = "jax_disable_most_optimizations"


def make_quick() -> None:
    """Sets what this process and those that it starts compile with.

    Before JAX starts its backend, which reads the flags once.
    """
    jax.config.update(_DISABLE, True)
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in _known(flag for flag in _FLAGS if flag not in flags):
        flags += f" --{flag}={_FLAGS[flag]}"
    os.environ["XLA_FLAGS"] = flags


def _known(flags: Iterable[str]) -> list[str]:
    """Those flags that this XLA has; it ends the process at one it does not know."""
    for path in pathlib.Path(jaxlib.__file__).parent.glob("libjax_common*"):
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return [flag for flag in flags if content.find(flag.encode()) >= 0]
    return []


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Optimizes as for users: for tests of compiled programs."""
    jax.config.update(_DISABLE, False)
    try:
        yield
    finally:
        jax.config.update(_DISABLE, True)
