"""Products, norms and factorisations that the geometry is made of."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# For what a basis is made of: bfloat16 passes, the default on TPUs, would lose it.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def safe_norm(vector: jax.Array) -> jax.Array:
    """The norm, or 1 where it is 0: to divide by."""
    norm = jnp.linalg.norm(vector)
    return jnp.where(norm > 0, norm, 1)


def power_of_two(matrix: jax.Array) -> jax.Array:
    """The power of two that brings a matrix near 1 when divided by it.

    Fourth powers of a gradient appear while tracking and would leave float32's
    range for entries of 1e-10; dividing by a power of two costs no accuracy.

    Args:
      matrix: any shape.

    Returns:
      A scalar that divides the largest entry to a magnitude in [1, 2), or in
      [0, 2) where it or its reciprocal would not be a normal number.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(matrix)))
    limit = -jnp.finfo(matrix.dtype).minexp - 2
    exponent = jnp.clip(exponent - 1, -limit, limit)
    return jnp.ldexp(jnp.ones([], matrix.dtype), exponent)


def unit_scale(matrix: jax.Array) -> jax.Array:
    """A matrix divided by its `power_of_two`: entries below 2 in magnitude."""
    return matrix / power_of_two(matrix)


def with_signs_of(columns: jax.Array, others: jax.Array) -> jax.Array:
    """Flips each column that points away from the column of another matrix."""
    cosines = jnp.sum(columns * others, axis=0, keepdims=True)
    return jnp.where(cosines < 0, -columns, columns)


def orthonormal_columns(matrix: jax.Array) -> jax.Array:
    """The Q of a Householder QR: orthonormal for rank-deficient matrices too."""
    # The TPU compiler unrolls its own QR: half a minute for 2736 x 512.
    q = jax.lax.platform_dependent(whole(matrix), tpu=householder_q, default=_library_q)
    return whole(q)


def whole(matrix: jax.Array, axes: Sequence[int] = (-2, -1)) -> jax.Array:
    """Asks for a matrix whole on every device of a mesh with automatic axes.

    Devices that share the rows of a matrix would exchange numbers for every one of
    its columns while it is decomposed.

    Args:
      matrix: of shape (..., m, n).
      axes: that are not to be split; others stay where they are.

    Returns:
      The same matrix.
    """
    mesh = jax.typeof(matrix).sharding.mesh
    if AxisType.Auto not in mesh.axis_types or mesh.size == 1:
        return matrix
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * matrix.ndim
    for axis in axes:
        spec[axis] = None
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(matrix, place)


# One matrix after another: on CPUs the batched QRs of several leaves wait for
# each other's threads and never finish (seen with jaxlib 0.10.2).
@jax.custom_batching.sequential_vmap
def _library_q(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def householder_q(matrix: jax.Array) -> jax.Array:
    """The Q of a QR factorisation, in loops that compile to very little code.

    Unblocked Householder reflections (Golub & Van Loan, algorithms 5.2.1 and
    5.1.5): slower to run than a library's QR, and compiled in under a second
    by the TPU compiler.

    Args:
      matrix: of shape (m, r) with r <= m; any rank.

    Returns:
      Orthonormal columns of shape (m, r) whose leading ones span what the
      leading ones of `matrix` span.
    """
    m, rank = matrix.shape

    def reflect(vector, columns):
        return columns - 2 * jnp.outer(vector, dot(vector, columns))

    def eliminate(j, carry):
        columns, vectors = carry
        below = jnp.where(jnp.arange(m) >= j, columns[:, j], 0)
        below /= safe_norm(below)
        # The sign avoids cancellation; a zero column, of norm 0, reflects nothing.
        sign = jnp.where(below[j] < 0, -1.0, 1.0).astype(below.dtype)
        vector = below.at[j].add(sign * jnp.linalg.norm(below))
        vector /= safe_norm(vector)
        return reflect(vector, columns), vectors.at[:, j].set(vector)

    _, vectors = jax.lax.fori_loop(0, rank, eliminate, (matrix, jnp.zeros_like(matrix)))
    return jax.lax.fori_loop(
        0,
        rank,
        lambda i, columns: reflect(vectors[:, rank - 1 - i], columns),
        jnp.eye(m, rank, dtype=matrix.dtype),
    )
