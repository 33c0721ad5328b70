"""Checksums of arrays: what they tell apart, and that they stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.rundir import checksums, damage


def flipped(array, *positions, bit):
    bits = np.array(array)
    view = bits.view(f"u{bits.itemsize}").reshape(-1)
    for position in positions:
        view[position] ^= view.dtype.type(1 << bit)
    return bits


def swapped(array, first, second):
    array = np.array(array)
    array[[first, second]] = array[[second, first]]
    return array


# The lower half of the bits is zero, as in bfloat16.
_ROUNDED = np.asarray(
    jax.random.normal(jax.random.key(0), (300, 512)).astype(jnp.bfloat16), np.float32
)
_HALF = _ROUNDED.reshape(-1).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("array", "other"),
    [
        *((_ROUNDED, flipped(_ROUNDED, 40_000, bit=bit)) for bit in (0, 15, 30, 31)),
        (_ROUNDED, flipped(_ROUNDED, 3, 77, bit=31)),
        (_ROUNDED, flipped(_ROUNDED, 3, 131_075, bit=20)),
        (_ROUNDED, swapped(_ROUNDED, 5, 6)),
        (_ROUNDED, swapped(_ROUNDED, 5, 5 + 64)),
        (_ROUNDED, swapped(_ROUNDED, 5, 5 + 256)),
        (_ROUNDED[:, :300], _ROUNDED[:, :300].T),
        (_ROUNDED, np.zeros_like(_ROUNDED)),
        (_HALF, flipped(_HALF, 1, 2, bit=15)),
        (_HALF, swapped(_HALF, 0, 2**16)),
        (np.int32(5), np.int32(4)),
        (np.arange(6, dtype=np.uint8), np.arange(1, 7, dtype=np.uint8)),
        (np.array([True, False]), np.array([False, True])),
    ],
)
def test_checksums_tell_arrays_apart(array, other):
    first, second, again = (
        checksums.of_arrays({"leaf": x})["['leaf']"] for x in (array, other, array)
    )
    assert int(first) == int(again) != int(second)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64])
@pytest.mark.parametrize("bit", [0, 31, 32, 51, 63])
@pytest.mark.parametrize("shape", [(), (5, 7)])
def test_checksums_see_all_of_eight_bytes(dtype, bit, shape):
    array = np.arange(1, 36).reshape(5, 7).astype(dtype)
    array = array if shape else array[1, 2]
    bits = np.array(array).view(np.uint64)
    bits[(2, 3) if shape else ()] ^= np.uint64(1) << np.uint64(bit)
    with jax.enable_x64(True):
        saved = checksums.of_arrays({"leaf": array})
        check = {"rest": {path: int(value) for path, value in saved.items()}}
        checksums.compare({"rest": {"leaf": array}}, check)
        with pytest.raises(damage.ContentError):
            checksums.compare({"rest": {"leaf": bits.view(dtype)}}, check)
        # Checkpoints of earlier versions are valid; half of their bits are unchecked.
        before = checksums.of_arrays({"leaf": array}, whole=False)
        check = {"rest": {path: int(value) for path, value in before.items()}}
        checksums.compare({"rest": {"leaf": array}}, check)


def test_checksums_of_four_bytes_are_those_of_earlier_versions():
    assert int(checksums.of_arrays({"leaf": np.float32(1.5)})["['leaf']"]) == (
        np.float32(1.5).view(np.uint32)
    )
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert int(checksums.of_arrays({"leaf": array})["['leaf']"]) == 3_282_572_822


def test_checksums_do_not_depend_on_the_sharding():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    for spec in [("x", "y"), (None, ("x", "y")), ("y", None)]:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        placed = jax.device_put(_ROUNDED, sharding)
        assert checksums.of_arrays(placed) == checksums.of_arrays(_ROUNDED)
