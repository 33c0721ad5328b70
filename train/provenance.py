"""Where a number comes from: command, versions, machine."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "libtpu", "optax", "flax", "subtrack-jax")


def provenance(program: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to get the same numbers, for a results file."""
    device = jax.devices()[0]
    return {
        "command": shlex.join([*program.split(), *argv]),
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {
            "system": platform.platform(terse=True),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "devices": len(jax.devices()),
            "device_kind": device.device_kind,
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout, with a + if something in it has changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            cwd=os.path.dirname(__file__),
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
