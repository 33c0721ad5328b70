"""Explicit mesh axes: functions run with automatic axes inside.

On automatic meshes the compiler places everything. On explicit ones ("sharding in
types") a product over a sharded axis has no type of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from subtrack_jax._internal import placement


def report(function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function with small results, replicated on meshes of either kind."""
    mesh = explicit_mesh(trees)
    if mesh is None:
        return function(*trees)
    replicated = NamedSharding(mesh, PartitionSpec())
    return with_automatic_axes(function, mesh, replicated)(*trees)


def placed_like(like: Any, function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function whose results have the structure and shardings of a tree."""
    mesh = explicit_mesh(trees)
    if mesh is None:
        return function(*trees)
    out_sharding = jax.tree.map(lambda leaf: own_sharding(leaf, mesh), like)
    return with_automatic_axes(function, mesh, out_sharding)(*trees)


def local(value: Any) -> Any:
    """Reshards a hyper-parameter to the mesh of the function that uses it.

    `optax.inject_hyperparams` traces it outside of the stage, where axes may be
    explicit; operations with values on the automatic mesh inside would fail.
    """
    if not isinstance(value, jax.Array):
        return value
    mesh, own_mesh = jax.sharding.get_abstract_mesh(), jax.typeof(value).sharding.mesh
    if mesh.empty or own_mesh.empty or own_mesh == mesh:
        return value
    return jax.sharding.reshard(value, PartitionSpec())


def as_explicit(mesh: Any) -> AbstractMesh:
    """The abstract mesh of the same axes, all of them explicit."""
    return AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )


def explicit_mesh(tree: Any) -> Any:
    """The mesh of a tree's arrays if it has explicit axes, else None."""
    for leaf in jax.tree.leaves(tree):
        sharding = placement.explicit_sharding(leaf)
        if sharding is not None:
            return sharding.mesh
    return None


def with_automatic_axes(function: Callable, mesh: Any, out_sharding: Any) -> Callable:
    """A function in which the explicit axes of a mesh are automatic.

    Inside of `shard_map` over some of the axes, these are manual and stay so.
    """
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_sharding)


def own_sharding(leaf: Any, mesh: Any) -> NamedSharding:
    """The sharding in a leaf's type, or replicated."""
    own = placement.explicit_sharding(leaf)
    return NamedSharding(mesh, PartitionSpec()) if own is None else own
