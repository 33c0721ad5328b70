"""Provenance of measurements: software versions, machine, commit."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "libtpu", "optax", "flax", "subtrack-jax")


def versions() -> dict[str, str]:
    """Versions of Python, the packages used, and the checkout's commit."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"commit": _commit()}


def machine() -> dict[str, Any]:
    """Devices, processor and operating system."""
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
    """Commit of the checkout, with a + if it has uncommitted changes."""
    git, checkout = shutil.which("git"), pathlib.Path(__file__).parent
    if git is None:
        return "unknown"
    # close_fds=False lets Python spawn instead of fork, of which JAX warns.
    done = subprocess.run(
        [git, "-C", checkout, "describe", "--always", "--dirty=+", "--abbrev=12"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
        close_fds=False,
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
