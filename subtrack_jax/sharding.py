"""Stages on meshes whose axes are explicit, and where low-rank state lives.

On automatic meshes the compiler places everything and this module does nothing
but allocate state. On explicit ones ("sharding in types") a product over a
sharded axis has no type of its own; stages therefore compute with automatic
axes inside and give every result the type decided here:

- what has the shape of a gradient keeps the gradient's sharding;
- a basis is split along its m rows, coordinates and moments along their n
  columns, over all mesh axes that split the matrix;
- batch axes stay as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from subtrack_jax.low_rank import MatrixView
from subtrack_jax.record import LowRankLeaf, is_record, map_records


def stage(
    init_fn: Callable[[optax.Params], Any],
    update_fn: Callable[..., tuple[Any, Any]],
    check_updates: Callable[[Any], None],
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation that works on explicit and automatic meshes.

    Args:
      init_fn: from parameters to state.
      update_fn: (updates, state, **extra_args) -> (updates, state), in which
        nothing need be said about sharding.
      check_updates: raises if the updates are not what the stage works on.

    Returns:
      The transformation.
    """

    def update(updates, state, params=None, **extra_args):
        del params
        check_updates(updates)

        def run(updates, state):
            return update_fn(updates, state, **extra_args)

        mesh = _explicit_mesh(updates)
        if mesh is None:
            return run(updates, state)
        shapes = jax.eval_shape(run, *_without_sharding((updates, state)))
        out_sharding = _result_shardings(*shapes, updates, state, mesh)
        return jax.sharding.auto_axes(run, out_sharding=out_sharding)(updates, state)

    return optax.GradientTransformationExtraArgs(init_fn, update)


def basis_like(leaf: Any, view: MatrixView, dtype: Any) -> jax.Array:
    """Columns of the identity: orthonormal before the first gradient is seen."""
    *batch, m, rank = view.basis_shape
    eye = jnp.broadcast_to(jnp.eye(m, rank, dtype=dtype), (*batch, m, rank))
    return _place(eye, leaf, lambda spec, mesh: _basis_spec(view, spec, mesh))


def coordinates_like(leaf: Any, view: MatrixView, dtype: Any) -> Any:
    """Zeros of the shape of a leaf's coordinates."""
    zeros = jnp.zeros(view.coordinates_shape, dtype)
    return _place(zeros, leaf, lambda spec, mesh: _coordinates_spec(view, spec, mesh))


def norms_like(leaf: Any, view: MatrixView, dtype: Any) -> jax.Array:
    """One zero for each matrix of a leaf."""
    zeros = jnp.zeros(view.batch_shape, dtype)
    return _place(zeros, leaf, lambda spec, _: _batch_spec(view, spec))


def _explicit_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding in a leaf's type, if its mesh has explicit axes."""
    sharding = getattr(jax.typeof(leaf), "sharding", None)
    if isinstance(sharding, NamedSharding) and AxisType.Explicit in (
        sharding.mesh.axis_types
    ):
        return sharding
    return None


def _explicit_mesh(updates: Any) -> Any:
    for leaf in jax.tree.leaves(updates):
        sharding = _explicit_sharding(leaf)
        if sharding is not None:
            return sharding.mesh
    return None


def _place(value: jax.Array, leaf: Any, spec_of: Callable) -> jax.Array:
    """Puts new state where the rule wants it, next to its parameter."""
    is_traced = isinstance(leaf, jax.core.Tracer)
    # Traced values on automatic meshes have no sharding yet: the compiler's turn.
    sharding = (
        _explicit_sharding(leaf) if is_traced else getattr(leaf, "sharding", None)
    )
    if not isinstance(sharding, NamedSharding):
        return value
    spec = spec_of(_padded(sharding.spec, leaf.ndim), sharding.mesh)
    put = jax.sharding.reshard if is_traced else jax.device_put
    return put(value, NamedSharding(sharding.mesh, spec))


def _without_sharding(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _result_shardings(new_updates, new_state, updates, state, mesh) -> Any:
    """Shardings for the results of a stage; state keeps the types it has."""

    def named(spec):
        return NamedSharding(mesh, spec)

    def own(leaf):
        sharding = _explicit_sharding(leaf)
        return named(PartitionSpec()) if sharding is None else sharding

    def of_record(record: LowRankLeaf, before):
        gradient = before.gradient if is_record(before) else before
        view, sharding = record.view, own(gradient)
        spec = _padded(sharding.spec, len(view.shape))
        basis = named(_basis_spec(view, spec, mesh))
        coordinates = named(_coordinates_spec(view, spec, mesh))
        batch = named(_batch_spec(view, spec))
        return record.replace(
            gradient=sharding,
            basis=basis,
            previous_basis=basis,
            rank_one=jax.tree.map(lambda _: batch, record.rank_one),
            moved=named(PartitionSpec()),
            coordinates=record.coordinates and coordinates,
            direction=record.direction and coordinates,
        )

    def of_plain(_, before):
        return own(before.gradient if is_record(before) else before)

    return map_records(of_record, of_plain, new_updates, updates), jax.tree.map(
        own, state
    )


def _padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (ndim - len(spec)))


def _batch_spec(view: MatrixView, spec: tuple[Any, ...]) -> PartitionSpec:
    return PartitionSpec(*(spec[axis] for axis in view.batch_axes))


def _basis_spec(view: MatrixView, spec: tuple[Any, ...], mesh: Any) -> PartitionSpec:
    axes = _matrix_axes(view, spec, mesh, view.basis_shape[-2])
    return PartitionSpec(*_batch_spec(view, spec), axes, None)


def _coordinates_spec(
    view: MatrixView, spec: tuple[Any, ...], mesh: Any
) -> PartitionSpec:
    axes = _matrix_axes(view, spec, mesh, view.coordinates_shape[-1])
    return PartitionSpec(*_batch_spec(view, spec), None, axes)


def _matrix_axes(
    view: MatrixView, spec: tuple[Any, ...], mesh: Any, size: int
) -> tuple[str, ...]:
    """Mesh axes that split the matrix, as many as divide `size`."""
    chosen: tuple[str, ...] = ()
    pieces = 1
    for axis in view.row_axes + view.column_axes:
        names = spec[axis] or ()
        for name in (names,) if isinstance(names, str) else names:
            if size % (pieces * mesh.shape[name]) == 0:
                chosen, pieces = (*chosen, name), pieces * mesh.shape[name]
    return chosen
