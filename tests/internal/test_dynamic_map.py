"""Dynamic 8-bit map: codes, rounding to codes, blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subtrack_jax._internal.dynamic_map import block_size, decode, encode
from tests import common

BITS = {"int8": 7, "uint8": 8}


def _dynamic_map(bits):
    """Positive codes in order, decade by decade (Dettmers et al., section 2.1)."""
    decades = []
    for exponent in range(bits):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        decades.append(10.0 ** (exponent + 1 - bits) * (edges[1:] + edges[:-1]) / 2)
    return np.concatenate(decades)


@pytest.mark.parametrize("dtype", BITS)
def test_codes_are_those_of_the_dynamic_map(dtype, x64):
    codes = jnp.arange(1, 2 ** BITS[dtype], dtype=dtype)[:, None]
    scale = jnp.full(codes.shape, 3.0)
    want = 3 * _dynamic_map(BITS[dtype])
    np.testing.assert_allclose(decode(codes, scale)[:, 0], want, rtol=1e-12)
    if dtype == "int8":
        got = decode(-codes, scale)[:, 0]
        np.testing.assert_allclose(got, -want, rtol=1e-12)


@pytest.mark.parametrize("dtype", BITS)
def test_a_number_is_coded_as_one_of_its_neighbours(dtype, x64):
    """Nearest code within a decade; in coarse decades the neighbour that is safe.

    The sign and a block's largest are kept.
    """
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(-BITS[dtype], 0, size=(500, 40))
    x[:, 0] = 1
    if dtype == "int8":
        x *= rng.choice([-1, 1], size=x.shape)
    x *= 10 ** rng.uniform(-9, 3, size=(500, 1))
    codes, scale = encode(jnp.array(x), dtype)
    assert (codes.dtype, scale.shape) == (dtype, (500, 1))
    got = np.asarray(decode(codes, scale))
    np.testing.assert_allclose(got[:, 0], x[:, 0], rtol=1e-12)
    kept = got != 0
    np.testing.assert_array_equal(np.sign(got)[kept], np.sign(x)[kept])
    levels = np.concatenate([[0], _dynamic_map(BITS[dtype])])
    fraction = np.abs(x) / np.asarray(scale)
    above = np.clip(np.searchsorted(levels, fraction), 1, len(levels) - 1)
    apart = levels[above] - levels[above - 1]
    error = np.abs(got - x) / np.asarray(scale)
    assert np.all(error <= apart + 1e-12)
    decade = np.floor(np.log2(above)).astype(int)
    is_fine = (decade >= 3) & (decade == np.floor(np.log2(np.maximum(above - 1, 1))))
    assert np.all((error <= apart / 2 + 1e-12)[is_fine])
    is_coarse = (decade < 3) & (above > 1)
    outwards = 1 if dtype == "uint8" else -1
    away = outwards * (np.abs(got) - np.abs(x)) / np.asarray(scale)
    assert np.all((away >= -0.02 * apart)[is_coarse])


@pytest.mark.parametrize(
    ("dtype", "row"),
    [
        *(("int8", row) for row in (32, 160, 1376)),
        *(("uint8", row) for row in (64, 257, 5461)),
    ],
)
def test_round_trip(row, dtype):
    """Normal numbers within a hundredth; a second round trip changes nothing."""
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 128, row)))
    if dtype == "int8":
        x = x * jax.random.rademacher(jax.random.key(1), x.shape)
    codes, scale = encode(x, dtype)
    assert codes.shape == x.shape
    assert 4 * scale.size <= codes.size / 8
    got = decode(codes, scale)
    error = jnp.linalg.norm(jnp.ravel(got - x)) / jnp.linalg.norm(jnp.ravel(x))
    assert error < (0.013 if dtype == "int8" else 0.007)
    again, _ = encode(got, dtype)
    np.testing.assert_array_equal(again, codes)


def test_zero_and_next_to_it():
    """A root is coded as zero only if it is zero; small first moments are."""
    x = jnp.array([[1.0, 0.0, 1e-12, 2e-7, 6e-7] + [0.5] * 27])
    roots, _ = encode(x, "uint8")
    assert list(roots[0, 1:3]) == [0, 1]
    momenta, _ = encode(-x, "int8")
    assert list(momenta[0, 1:5]) == [0, 0, 0, -1]
    zeros = jnp.zeros((1, 32))
    for dtype in BITS:
        codes, scale = encode(zeros, dtype)
        np.testing.assert_array_equal(decode(codes, scale), zeros)


@pytest.mark.parametrize("dtype", BITS)
def test_dithering(dtype):
    """The mean over steps is the number, and each code is one of two neighbours."""
    rng = np.random.default_rng(0)
    x = jnp.array(10 ** rng.uniform(-2, 0, size=(8, 128)), jnp.float32)
    codes, scales = jax.vmap(lambda count: encode(x, dtype, count))(jnp.arange(200))
    numbers = jax.vmap(decode)(codes, scales)
    nearest = decode(*encode(x, dtype))
    assert np.all(np.ptp(codes.astype(np.int32), axis=0) <= 1)
    error = np.abs(numbers.mean(0) / x - 1)
    assert error.mean() < 0.1 * np.abs(nearest / x - 1).mean()


def test_blocks_fit_the_shards():
    """Widths of published models: as many full blocks as devices."""
    for row in (1376, 2048, 2736, 4096, 11008, 32000):
        size = block_size(row)
        assert row % size == 0 and 64 <= size <= 256
        assert (row // size) % min(8, 2 ** (row & -row).bit_length() // 2) == 0
    assert block_size(257) == 256  # a prime: the last block is shorter


@pytest.mark.parametrize("count", [None, 7])
def test_matrices_of_a_stack_are_coded_as_alone(count):
    x = jnp.array(common.drifting_gradients(common.Leaf((3, 64, 96)), 1)[0])
    count = None if count is None else jnp.int32(count)
    together = encode(x, "int8", count)
    for layer in range(3):
        jax.tree.map(
            np.testing.assert_array_equal,
            encode(x[layer], "int8", count),
            common.at(together, layer),
        )
