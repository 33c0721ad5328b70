"""Where a number comes from: versions, machine, commit."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "libtpu", "optax", "flax", "subtrack-jax")


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"commit": _commit()}


def machine() -> dict[str, Any]:
    """Of what decides the seconds."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
    }


def _commit() -> str:
    """Of the checkout, with a + if something in it has changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            cwd=pathlib.Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
