"""Device mesh of a run, parsed from `--mesh`; check of batch sizes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

AXES = ("data", "fsdp", "tensor")
# Axes over which the sequences of a batch are split.
BATCH_AXES = ("data", "fsdp")


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the size of each axis from text such as "fsdp=4,tensor=2"; default 1.

    Raises:
      ValueError: an axis is unknown, repeated, or has no size; or several are -1.
    """
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in seen:
            raise ValueError(
                f"--mesh {text!r}: {name!r} is not one of {', '.join(AXES)}, each once"
            )
        try:
            sizes[name] = int(size)
        except ValueError:
            sizes[name] = 0
        if sizes[name] < 1 and sizes[name] != -1:
            raise ValueError(
                f"--mesh {text!r}: {name} needs a size of at least 1, or -1 to fill"
            )
        seen.add(name)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh {text!r}: only one axis can be -1")
    return sizes


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of these devices; by default of all devices of all processes.

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    sizes = parse_mesh(text)
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if s == -1 else s for s in sizes.values())
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"--mesh {text!r} does not fit {len(devices)} devices: the product of the "
            "sizes must be their number; -1 fills one axis"
        )
    return Mesh(np.array(devices).reshape(shape), AXES)


def batch_pieces(mesh: Mesh) -> int:
    """Number of pieces into which a mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size_sequences: int, parts: int, mesh: Mesh) -> None:
    """Raises a ValueError if a part of a batch cannot be split over the mesh."""
    check_rows("--batch-size-sequences", batch_size_sequences, parts, mesh)


def check_rows(flag: str, rows: int, parts: int, mesh: Mesh) -> None:
    """Raises a ValueError if a part of a batch cannot be split over the mesh.

    Args:
      flag: the command line's name for the rows.
      rows: rows of a batch.
      parts: micro-batches of a batch.
      mesh: the devices.
    """
    pieces = batch_pieces(mesh)
    if rows % (parts * pieces):
        by_parts = f"--gradient-accumulation-steps {parts} times " if parts > 1 else ""
        raise ValueError(
            f"{flag} {rows} must be a multiple of {parts * pieces}: {by_parts}the "
            f"{pieces} devices of the mesh's axes data and fsdp"
        )
