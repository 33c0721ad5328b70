"""Checksums of sharded arrays and of JSON values."""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.rundir import damage


@functools.partial(jax.jit, static_argnames="whole")
def of_arrays(tree: Any, whole: bool = True) -> dict[str, jax.Array]:
    """Checksum of each leaf by path, independent of its sharding.

    Computed on the devices that hold the leaves. Detects flipped bits, which the
    compressed files do not.

    Args:
      tree: arrays.
      whole: False for checksums of earlier versions, which ignored the upper half of
        eight-byte numbers.
    """

    def checksum(leaf):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        itemsize = leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * itemsize}")
        # Hash each element with its position (MurmurHash3's constants): in a plain sum
        # two flipped signs or two exchanged elements would cancel.
        mixed = bits.astype(jnp.uint32)
        if itemsize == 8 and whole:
            # The constant makes zeros differ from an earlier version's checksum.
            upper = (bits >> 32).astype(jnp.uint32) + np.uint32(0x9E3779B9)
            mixed = mixed ^ _mix(upper)
        for axis, size in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            mixed = _mix(mixed + index * np.uint32(2_654_435_761) + np.uint32(size))
        return jnp.sum(mixed, dtype=jnp.uint32)

    return {
        jax.tree_util.keystr(path): checksum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def compare(arrays: dict[str, Any], check: dict[str, Any]) -> None:
    """Raises a ContentError if an array does not match its saved checksum."""
    for name, tree in arrays.items():
        unlike = _unlike(tree, check[name], whole=True)
        if unlike and _unlike(tree, check[name], whole=False):
            raise damage.ContentError(f"{unlike[0]} is not what was saved")


def _unlike(tree: Any, sums: dict[str, int], whole: bool) -> list[str]:
    """Paths of the leaves whose checksums differ."""
    found = jax.device_get(of_arrays(tree, whole))
    return [path for path, value in found.items() if sums.get(path) != int(value)]


def digest(value: Any) -> int:
    """Checksum of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
