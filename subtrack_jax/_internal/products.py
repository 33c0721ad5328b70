"""Products, norms and scaling for the geometry of subspaces."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Full-precision product: TPUs default to bfloat16, which destroys orthonormality.
dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def real_only(function: _Function) -> _Function:
    """Raises for complex arguments: transposes would have to be conjugated."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            dtype = getattr(value, "dtype", None)
            if isinstance(dtype, np.dtype) and dtype.kind == "c":
                raise ValueError(
                    f"{function.__name__} was given {dtype}: use real numbers, as"
                    " optax.contrib.split_real_and_imaginary makes of complex ones."
                )
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """Square root whose derivative at 0 is 0 instead of infinity."""
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals, tangents):
    (x,), (slope,) = primals, tangents
    result = jnp.sqrt(x)
    return result, jnp.where(x > 0, slope / jnp.where(x > 0, 2 * result, 1), 0)


def norm(vector: jax.Array, axis: int | None = None) -> jax.Array:
    """Norm, or norms along an axis that is kept; differentiable at 0."""
    return root(jnp.sum(vector * vector, axis=axis, keepdims=axis is not None))


def safe_norm(vector: jax.Array, axis: int | None = None) -> jax.Array:
    """Norm to divide by: as `norm`, but 1 where it is 0."""
    length = norm(vector, axis)
    return jnp.where(length > 0, length, 1)


def power_of_two(matrix: jax.Array) -> jax.Array:
    """Power of two that scales a matrix to the order of 1 by division.

    Fourth powers of a gradient appear while tracking and would leave float32's
    range for entries of 1e-10; dividing by a power of two costs no accuracy.

    Args:
      matrix: any shape.

    Returns:
      A scalar that divides the largest entry to a magnitude in [1, 2), or in
      [0, 2) where it or its reciprocal would not be a normal number.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(jax.lax.stop_gradient(matrix))))
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


def replicated(matrix: jax.Array, axes: Sequence[int] = (-2, -1)) -> jax.Array:
    """Constrains a matrix to be replicated on a mesh with automatic axes.

    Devices that share the rows of a matrix would exchange numbers for every one of
    its columns while it is decomposed.

    Args:
      matrix: (..., m, n).
      axes: axes to gather; the others stay split as they are.

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
