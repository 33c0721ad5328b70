"""Tests of linear_algebra.py: scaling and a QR in loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from subtrack_jax import linear_algebra
from tests import common

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(
    "largest, power", [(0.75, 0.5), (1.0, 1.0), (-3.0, 2.0), (1e-30, 2.0**-100)]
)
def test_power_of_two(largest, power):
    assert linear_algebra.power_of_two(jnp.array([0.1 * largest, largest])) == power
    assert linear_algebra.power_of_two(jnp.zeros(3)) > 0


@pytest.mark.parametrize(
    "m, r, true_rank", [(7, 4, 4), (4, 4, 4), (7, 4, 2), (7, 4, 0)]
)
def test_householder_q(m, r, true_rank, precision):
    """Orthonormal whatever the rank; leading columns span the leading columns."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(m, true_rank)) @ rng.normal(size=(true_rank, r))
    _check_q(matrix, true_rank, precision)


def test_householder_q_without_cancellation(precision):
    """A column that is almost on its axis already is reflected to the far side."""
    noise = np.random.default_rng(0).normal(size=(7, 4))
    _check_q(np.eye(7, 4) + 1e-4 * noise, 4, precision)


def _check_q(matrix, true_rank, precision):
    q = linear_algebra.householder_q(jnp.asarray(matrix, precision))
    assert q.shape == matrix.shape and q.dtype == precision
    rounding = {"float32": 8e-6, "float64": 4e-14}[precision]
    assert common.orthonormality_error(q) < rounding
    q = np.asarray(q, np.float64)
    for leading in range(1, true_rank + 1):
        within = q[:, :leading] @ (q[:, :leading].T @ matrix[:, :leading])
        np.testing.assert_allclose(within, matrix[:, :leading], atol=rounding)
