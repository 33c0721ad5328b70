"""Devices that need not be there: TPU slices to compile for, by name."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """Devices that a program is compiled for."""

    devices: Sequence[Any]
    memory_bytes: int | None  # of one device; None: not known


class _Chip(NamedTuple):
    topology: str  # the name that libtpu has for it
    memory_gib: int
    options: dict[str, str]


# A v4 chip has two cores, which share its memory and are used as one device.
_CHIPS = {
    "tpu-v4": _Chip("v4", 32, {"chip_config_name": "megacore"}),
    "tpu-v5e": _Chip("v5e", 16, {}),
    "tpu-v5p": _Chip("v5p", 95, {}),
    "tpu-v6e": _Chip("v6e", 32, {}),
}
# Nothing is asked of a machine that is not there, no other process is kept from
# using one that is, and what libtpu has to say about it is not for users.
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
    """The devices that a name stands for; to be called before JAX has devices.

    Args:
      name: tpu-v5p:4x4x4, a kind of chip and the shape of a slice, or cpu:64, that
        many devices of this machine.

    Raises:
      ValueError: there is no such target, or what it takes is not installed.
    """
    kind, _, shape = name.partition(":")
    # Whatever this machine has is left alone: somebody may be using it.
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu" and shape.isdecimal() and int(shape) > 0:
        return Target(_cpu_devices(name, int(shape)), None)
    sizes = shape.split("x")
    if kind in _CHIPS and all(size.isdecimal() and int(size) > 0 for size in sizes):
        return _open_tpu(name, _CHIPS[kind], shape)
    chips = ", ".join(_CHIPS)
    raise ValueError(
        f"unknown --target {name!r}: give a chip and the shape of a slice, e.g. "
        f"tpu-v5p:4x4x4 (chips: {chips}), or cpu:64 for so many virtual devices"
    )


def _cpu_devices(name: str, count: int) -> Sequence[Any]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has its devices already
        if len(jax.devices("cpu")) < count:
            raise ValueError(
                f"--target {name}: this process has {len(jax.devices('cpu'))} devices"
            ) from None
    return jax.devices("cpu")[:count]


def _open_tpu(name: str, chip: _Chip, shape: str) -> Target:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--target {name} takes the TPU compiler: pip install -e '.[tpu-plan]'; "
            "cpu:64 does without it"
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # Only now: the import alone looks for libtpu.
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.topology}:{shape}", **chip.options
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"--target {name} is not a slice: {error}") from error
    return Target(topology.devices, chip.memory_gib * 2**30)
