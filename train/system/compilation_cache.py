"""Compiled programs kept on disk, so that the next start need not compile them."""

import contextlib
import functools
import glob
import hashlib
import os
import pathlib
import platform
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax

from train.config.run_config import CompilationConfig
from train.system import console, files

# Without a limit every new shape of a model would add to it for ever.
LARGEST_BYTES = 2 * 2**30
_OF_JAX = "JAX_COMPILATION_CACHE_DIR"
_AT_LEAST = "jax_persistent_cache_min_compile_time_secs"
_PROBLEM = re.compile(r"Error (\w+) persistent compilation cache entry for '(.+?)': ")


def use(config: CompilationConfig) -> None:
    """Lets JAX keep compiled programs, to be called before it compiles the first.

    Each kind of CPU has a directory of its own, as programs hold its instructions.
    JAX_COMPILATION_CACHE_DIR goes before a directory of the config. A directory that
    cannot be written, or a damaged file in it, is one warning and costs time only.
    """
    directory = config.compilation_cache_dir
    if directory == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if _OF_JAX in os.environ:
        if directory != "auto":
            console.warn(
                f"--compilation-cache-dir {directory} is not used: {_OF_JAX} is set, "
                f"to {os.environ[_OF_JAX]!r}"
            )
        return
    if directory == "auto":
        directory = str(files.user_cache("compilation"))
    path = pathlib.Path(directory).expanduser().absolute() / _kind_of_cpu()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        limit_size(path, LARGEST_BYTES)
    except OSError as error:
        console.warn(
            f"--compilation-cache-dir {directory} cannot be used, so that every start "
            f"compiles anew: {error}"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    if _AT_LEAST.upper() not in os.environ:
        # JAX' second leaves out what makes up half of a small model's start.
        jax.config.update(_AT_LEAST, 0)
    # Also the second of two programs with one name.
    warnings.filterwarnings("always", _PROBLEM.pattern)
    warnings.showwarning = functools.partial(
        _show_warning, path, set(), warnings.showwarning
    )


def limit_size(directory: pathlib.Path, largest_bytes: int) -> None:
    """Removes the files that were not used for longest, down to a size of all."""
    files = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may do the same
            files.append((path, path.stat()))
    size = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: _last_use(file[1])):
        if size <= largest_bytes:
            break
        with contextlib.suppress(OSError):  # another user's, or a directory
            path.unlink()
            size -= stat.st_size


def _last_use(stat: os.stat_result) -> float:
    return max(stat.st_atime, stat.st_mtime)


def _kind_of_cpu() -> str:
    """A name for all machines whose CPUs have the same instructions."""
    kind = platform.machine()
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        text = platform.processor()
    # x86 calls them flags, Arm Features.
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = " ".join(sorted(found[1].split())) if found else text
    return f"{kind}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _show_warning(
    directory: pathlib.Path,
    told: set[str],
    show: Callable[..., None],
    message: Warning | str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Shortens JAX' warnings about its cache, and removes the files they are about.

    JAX never replaces a file: one that was cut short would be in the way for good.
    """
    problem = _PROBLEM.match(str(message))
    if problem is None:
        show(message, *args, **kwargs)
        return
    action, program = problem.groups()
    for path in directory.glob(f"{glob.escape(program)}-*"):
        path.unlink(missing_ok=True)
    if action not in told:
        told.add(action)
        reason = str(message)[problem.end() :]
        console.warn(f"{action} the compilation cache, {directory}, failed: {reason}")
