"""Compilation targets: TPU slices that are not present, virtual CPU devices."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """Devices to compile for."""

    devices: Sequence[Any]
    memory_bytes: int | None  # of one device; None: unknown


class _Chip(NamedTuple):
    topology: str  # libtpu's name
    memory_gib: int
    options: dict[str, str]
    host: str = "2x2"  # shape of the smallest slice: the chips of a host


# A v4 chip has two cores, which share its memory and are used as one device.
_CHIPS = {
    "tpu-v4": _Chip("v4", 32, {"chip_config_name": "megacore"}, "2x2x1"),
    "tpu-v5e": _Chip("v5e", 16, {}),
    "tpu-v5p": _Chip("v5p", 95, {}, "2x2x1"),
    "tpu-v6e": _Chip("v6e", 32, {}),
}
# Makes libtpu query no metadata server, lock no TPU of this machine, and log nothing.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def open_target(name: str) -> Target:
    """Opens a target by name; call before JAX initialises its devices.

    Args:
      name: chip and shape of a slice, e.g. tpu-v5p:4x4x4; one chip, e.g. tpu-v5p:1; or
        a number of virtual CPU devices, e.g. cpu:64.

    Raises:
      ValueError: there is no such target, or the TPU compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    # Accelerators of this machine may be in use by others.
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu" and shape.isdecimal() and int(shape) > 0:
        return Target(_cpu_devices(name, int(shape)), None)
    if kind in _CHIPS and shape == "1":
        host = _open_tpu(name, _CHIPS[kind], _CHIPS[kind].host)
        return host._replace(devices=host.devices[:1])
    sizes = shape.split("x")
    if kind in _CHIPS and all(size.isdecimal() and int(size) > 0 for size in sizes):
        return _open_tpu(name, _CHIPS[kind], shape)
    chips = ", ".join(_CHIPS)
    raise ValueError(
        f"unknown --target {name!r}: give a chip and the shape of a slice, e.g. "
        f"tpu-v5p:4x4x4 (chips: {chips}), 1 for one chip, or cpu:64 for 64 virtual "
        "devices"
    )


def _cpu_devices(name: str, count: int) -> Sequence[Any]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has initialised its devices
        if len(jax.devices("cpu")) < count:
            raise ValueError(
                f"--target {name}: this process has {len(jax.devices('cpu'))} devices"
            ) from None
    return jax.devices("cpu")[:count]


def _open_tpu(name: str, chip: _Chip, shape: str) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--target {name} needs the TPU compiler: pip install -e '.[tpu-plan]'; "
            "cpu:64 works without it"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # Imported late: the import already loads libtpu.
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.topology}:{shape}", **chip.options
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"--target {name} is not a slice: {error}") from error
    return Target(topology.devices, chip.memory_gib * 2**30)
