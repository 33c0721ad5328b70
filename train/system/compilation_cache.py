"""Persistent compilation cache of JAX: directory, size limit, short warnings."""

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

# Size limit: every new shape of a model adds programs.
LARGEST_BYTES = 2 * 2**30
_OF_JAX = "JAX_COMPILATION_CACHE_DIR"
_AT_LEAST = "jax_persistent_cache_min_compile_time_secs"
_PROBLEM = re.compile(r"Error (\w+) persistent compilation cache entry for '(.+?)': ")


def use(config: CompilationConfig) -> None:
    """Enables JAX's compilation cache; call before the first compilation.

    Each kind of CPU gets a subdirectory, because programs contain its instructions.
    JAX_COMPILATION_CACHE_DIR overrides the config. An unusable directory or a damaged
    file in it gives one warning.
    """
    directory = config.compilation_cache_dir
    if directory == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not jax.config.jax_enable_compilation_cache:
        if directory != "auto":
            console.warn(
                f"--compilation-cache-dir {directory} is not used: the cache is off, "
                "by JAX_ENABLE_COMPILATION_CACHE or for several processes on CPUs"
            )
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
            f"--compilation-cache-dir {directory} cannot be used, so every start "
            f"compiles again: {error}"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    if _AT_LEAST.upper() not in os.environ:
        # JAX's default of 1 s skips programs that are half of a small model's start.
        jax.config.update(_AT_LEAST, 0)
    # "always": a second program of the same name must be reported, too.
    warnings.filterwarnings("always", _PROBLEM.pattern)
    warnings.showwarning = functools.partial(
        _show_warning, path, set(), warnings.showwarning
    )


def limit_size(directory: pathlib.Path, largest_bytes: int) -> None:
    """Removes the least recently used files until a directory fits a size."""
    files = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            files.append((path, path.stat()))
    size = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: _last_use(file[1])):
        if size <= largest_bytes:
            break
        with contextlib.suppress(OSError):  # another user's file, or a directory
            path.unlink()
            size -= stat.st_size


def _last_use(stat: os.stat_result) -> float:
    return max(stat.st_atime, stat.st_mtime)


def _kind_of_cpu() -> str:
    """Name of the CPU's instruction set, equal on machines that share programs."""
    kind = platform.machine()
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = platform.processor()
    # The line is called flags on x86, Features on Arm.
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    features = " ".join(sorted(found[1].split())) if found else text
    return f"{kind}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _show_warning(
    directory: pathlib.Path,
    reported: set[str],
    show: Callable[..., None],
    message: Warning | str,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Shortens JAX's warnings about its cache and removes the files they name.

    JAX never replaces a file, so a truncated one would cause the warning forever.
    """
    problem = _PROBLEM.match(str(message))
    if problem is None:
        show(message, *args, **kwargs)
        return
    action, program = problem.groups()
    for path in directory.glob(f"{glob.escape(program)}-*"):
        path.unlink(missing_ok=True)
    if action not in reported:
        reported.add(action)
        reason = str(message)[problem.end() :]
        console.warn(f"{action} the compilation cache, {directory}, failed: {reason}")
