"""Scaling of matrices by powers of two."""

import jax.numpy as jnp
import pytest

from subtrack_jax._internal import products as linear_algebra

pytestmark = pytest.mark.usefixtures("strict_dtypes")


@pytest.mark.parametrize(
    "largest, power", [(0.75, 0.5), (1.0, 1.0), (-3.0, 2.0), (1e-30, 2.0**-100)]
)
def test_power_of_two(largest, power):
    assert linear_algebra.power_of_two(jnp.array([0.1 * largest, largest])) == power
    assert linear_algebra.power_of_two(jnp.zeros(3)) > 0
