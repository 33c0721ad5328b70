"""Shardings of basis, coordinates and norms, from the gradient's sharding.

- What has the shape of a gradient keeps the gradient's sharding;
- a basis is split along its m rows, coordinates and moments along their n
  columns, over all mesh axes that split the matrix (along the rank those that do
  not divide the long side);
- batch axes stay as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax._internal.products import replicated
from subtrack_jax._internal.trees import map_leaves, state_dtype


def basis_like(leaf: Any, view: MatrixView, dtype: Any) -> jax.Array:
    """Columns of the identity: the initial basis before the first gradient."""
    *batch, m, rank = view.basis_shape
    eye = jnp.broadcast_to(jnp.eye(m, rank, dtype=dtype), (*batch, m, rank))
    return place(eye, leaf, lambda spec, mesh: basis_spec(view, spec, mesh))


def coordinates_like(leaf: Any, view: MatrixView, dtype: Any) -> Any:
    """Zeros of the shape of a leaf's coordinates."""
    zeros = jnp.zeros(view.coordinates_shape, dtype)
    return place(zeros, leaf, lambda spec, mesh: coordinates_spec(view, spec, mesh))


def norms_like(params: optax.Params, views: Any) -> optax.Updates:
    """One zero for each matrix of the low-rank leaves of a tree."""

    def zeros(leaf, view):
        value = jnp.zeros(view.batch_shape, state_dtype(leaf.dtype))
        return place(value, leaf, lambda spec, _: batch_spec(view, spec))

    return map_leaves(zeros, lambda _: optax.MaskedNode(), params, views)


def place(value: jax.Array, leaf: Any, spec_of: Callable) -> jax.Array:
    """Shards new state by a rule that reads the parameter's sharding."""
    is_traced = isinstance(leaf, jax.core.Tracer)
    # Tracers on automatic meshes have no sharding; the compiler chooses.
    sharding = explicit_sharding(leaf) if is_traced else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return value
    spec = spec_of(padded(sharding.spec, leaf.ndim), sharding.mesh)
    put = jax.sharding.reshard if is_traced else jax.device_put
    return put(value, NamedSharding(sharding.mesh, spec))


def replicated_basis(basis: jax.Array, view: MatrixView) -> jax.Array:
    """Constrains a basis to be replicated, where that saves communication.

    A basis is split further than the rows of the gradient it meets in a product, so
    one of them has to move. The compiler by itself exchanges the gradient, m n / D
    numbers on each of D devices; a replicated basis, of m r, lets it add up
    coordinates, of r n, in place. Where r D > m, on large meshes, the former is less.
    """
    m, rank = view.basis_shape[-2:]
    is_less = rank * jax.typeof(basis).sharding.mesh.size <= m
    return replicated(basis) if is_less else basis


def unsplit_rank(coordinates: jax.Array) -> jax.Array:
    """Constrains coordinates to be unsharded along the rank, for products.

    Moments are where no mesh axis divides their columns. A product with them would
    have the compiler gather a gradient of m n numbers; coordinates have r n.
    """
    return replicated(coordinates, axes=(-2,))


def explicit_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding in a leaf's type, if its mesh has explicit axes."""
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in (
        sharding.mesh.axis_types
    ):
        return sharding
    return None


def padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    """Pads a spec with None to one entry per axis."""
    return (*spec, *(None,) * (ndim - len(spec)))


def batch_spec(view: MatrixView, spec: tuple[Any, ...]) -> PartitionSpec:
    """Spec of one number for each matrix, from the padded spec of the gradient."""
    return PartitionSpec(*(spec[axis] for axis in view.batch_axes))


def basis_spec(view: MatrixView, spec: tuple[Any, ...], mesh: Any) -> PartitionSpec:
    """Spec of a basis, from the padded spec of the gradient."""
    rows, columns = view.row_axes, view.column_axes
    own, other = (rows, columns) if view.basis_on_rows else (columns, rows)
    long, short = _split(view.basis_shape[-2:], spec, mesh, own + other)
    return PartitionSpec(*batch_spec(view, spec), long, short)


def coordinates_spec(
    view: MatrixView, spec: tuple[Any, ...], mesh: Any
) -> PartitionSpec:
    """Spec of coordinates and moments, from the padded spec of the gradient."""
    rows, columns = view.row_axes, view.column_axes
    own, other = (columns, rows) if view.basis_on_rows else (rows, columns)
    long, short = _split(view.coordinates_shape[:-3:-1], spec, mesh, own + other)
    return PartitionSpec(*batch_spec(view, spec), short, long)


def _split(
    shape: tuple[int, ...], spec: tuple[Any, ...], mesh: Any, axes: tuple[int, ...]
) -> tuple[tuple[str, ...], ...]:
    """Divides the mesh axes that split a matrix among (long side, rank).

    The long side comes first, and on it the mesh axes that split the same side of
    the gradient: products then add up in place instead of exchanging gradients.
    What does not divide the long side (5461 of LLaMA-1B) goes to the rank.
    """
    chosen: list[tuple[str, ...]] = [() for _ in shape]
    pieces = [1 for _ in shape]
    for axis in axes:
        names = spec[axis] or ()
        for name in (names,) if isinstance(names, str) else names:
            for side, size in enumerate(shape):
                if size % (pieces[side] * mesh.shape[name]) == 0:
                    chosen[side] += (name,)
                    pieces[side] *= mesh.shape[name]
                    break
    return tuple(chosen)
