"""Blocked QR in loops of matrix products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subtrack_jax._internal import orthonormal
from tests import common

pytestmark = pytest.mark.usefixtures("strict_dtypes")

blocked_q = jax.jit(orthonormal.blocked_q)

ROUNDING = {"float32": 8e-6, "float64": 4e-14}


@pytest.mark.parametrize(
    "m, r, true_rank",
    [
        (7, 4, 4),
        (4, 4, 4),
        (5, 1, 1),
        (7, 4, 2),
        (7, 4, 0),
        (300, 128, 40),
        (300, 300, 300),  # three panels; the last one overlaps
        (300, 270, 150),
        (129, 129, 0),
    ],
)
def test_blocked_q(m, r, true_rank, precision):
    """Orthonormal at any rank; leading columns span the leading columns."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(m, true_rank)) @ rng.normal(size=(true_rank, r))
    matrix /= max(1, np.abs(matrix).max() / 8)  # unit scale, for absolute bounds
    _check_q(matrix, true_rank, precision)


@pytest.mark.parametrize(
    "largest, smallest", [(1e-30, 1e-30), (1e30, 1e30), (1e20, 1e-25)]
)
def test_blocked_q_at_any_scale(largest, smallest):
    """Condition of the matrix, and of the columns in one panel."""
    matrix = np.random.default_rng(0).normal(size=(20, 8))
    scaled = matrix * np.geomspace(largest, smallest, 8)
    q = np.abs(blocked_q(jnp.asarray(scaled, jnp.float32)))
    np.testing.assert_allclose(q, np.abs(np.linalg.qr(matrix)[0]), 0, 1e-5)


@pytest.mark.parametrize("kind", ["ones", "many panels", "repeated", "kahan"])
def test_blocked_q_of_columns_that_depend(kind):
    matrix = {
        "ones": np.ones((40, 40)),
        "many panels": np.ones((300, 300)),
        "repeated": np.repeat(np.eye(40), 2, axis=1)[:, :40],
        "kahan": 0.9 ** np.arange(128)[:, None]
        * (np.eye(128) - 0.43 * np.triu(np.ones((128, 128)), 1)),
    }[kind]
    q = blocked_q(jnp.asarray(matrix, jnp.float32))
    assert common.orthonormality_error(q) < ROUNDING["float32"]


@pytest.mark.parametrize("scale", [1e-3, 1e-6])
def test_blocked_q_of_columns_that_nearly_depend(scale):
    """Singular values down to `scale` times the first one, across panels."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(m, 200)))[0] for m in (300, 200))
    matrix = left * np.geomspace(1, scale, 200) @ right.T
    q = blocked_q(jnp.asarray(matrix, jnp.float32))
    assert common.orthonormality_error(q) < ROUNDING["float32"]
    np.testing.assert_allclose(q @ (q.T @ matrix), matrix, atol=1e-5)


def test_blocked_q_of_few_rows():
    """Gradient of an embedding that has read one token."""
    q = blocked_q(jnp.zeros((200, 150)).at[3].set(1.0))
    assert common.orthonormality_error(q) < ROUNDING["float32"]
    np.testing.assert_allclose(q[:, 0], np.eye(200)[3], atol=1e-5)


def test_blocked_q_of_a_stack():
    """Mapped over a batch, like matrices that a mesh splits."""
    rng = np.random.default_rng(0)
    good = rng.normal(size=(140, 130))
    stack = jnp.asarray(np.stack([good, np.zeros_like(good)]), jnp.float32)
    first, second = jax.vmap(blocked_q)(stack)
    np.testing.assert_allclose(first, blocked_q(stack[0]), atol=1e-5)
    assert common.orthonormality_error(second) < ROUNDING["float32"]


def test_a_nan_stays_one():
    """A refresh ignores a bad gradient; a made-up basis would be kept."""
    matrix = jnp.ones((9, 5)).at[2, 3].set(jnp.nan)
    assert jnp.isnan(blocked_q(matrix)).any()


@pytest.mark.parametrize("platform, is_library", [("tpu", False), ("cpu", True)])
def test_who_factorises(platform, is_library):
    """The TPU compiler unrolls XLA's QR: half a minute for 2736 x 512."""
    traced = jax.jit(orthonormal.orthonormal_columns).trace(jnp.zeros((300, 200)))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("custom_call" in text) == is_library


def _check_q(matrix, true_rank, precision):
    q = blocked_q(jnp.asarray(matrix, precision))
    assert q.shape == matrix.shape and q.dtype == precision
    assert common.orthonormality_error(q) < ROUNDING[precision]
    q = np.asarray(q, np.float64)
    # Each column lies in the span of as many: the matrix is q times a triangle.
    within = (q @ np.triu(q.T @ matrix))[:, :true_rank]
    np.testing.assert_allclose(within, matrix[:, :true_rank], atol=ROUNDING[precision])
