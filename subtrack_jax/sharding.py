"""Stages on meshes whose axes are explicit, and the sharding of states.

On automatic meshes the compiler places everything. On explicit ones ("sharding in
types") a product over a sharded axis has no type of its own; stages therefore
compute with automatic axes inside and give every result the type that `placement`
decides.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from subtrack_jax._internal import placement
from subtrack_jax._internal.boxes import content, is_box
from subtrack_jax._internal.named_leaves import path_name
from subtrack_jax._internal.trees import as_arrays, is_hashable, is_traceable
from subtrack_jax.stages.record import LowRankLeaf, is_record, map_records


def state_sharding(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    param_shardings: Any = None,
) -> Any:
    """Where the state of an optimizer belongs, next to sharded parameters.

    For `jit(optimizer.init, out_shardings=...)`, for restoring checkpoints and for
    plans. A basis is split along its long side and moments in coordinates along
    their columns (or along the rank, where those do not divide), over all mesh axes
    that split the parameter: no device keeps a copy of what its parameter's sharding
    would split. State of the parameter's own shape is placed like it, scalars are on
    all devices. Names of axes that parameters carry as metadata (Flax's `Param` and
    `Partitioned`) are of no consequence, and low-rank state carries none: what Flax
    reads from metadata, `nnx.get_partition_spec`, calls it replicated. Use this
    instead.

    Args:
      optimizer: any transformation of this library or of optax, in any wrapper.
      params: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated.
      param_shardings: tree of `NamedSharding`s like `params`, on one mesh, whose
        axes may be automatic or explicit; None takes those of `params`.

    Returns:
      A tree of `NamedSharding`s like the optimizer's state.

    Raises:
      ValueError: a parameter has no `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> import subtrack_jax as stj
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32)}
      >>> shardings = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp", None))}
      >>> optimizer = stj.subtrack(1e-3, rank=16)
      >>> placed = stj.state_sharding(optimizer, params, shardings)
      >>> tuple(optax.tree.get(placed, "basis")["kernel"].spec)
      ('fsdp', None)
      >>> tuple(optax.tree.get(placed, "mu")["kernel"].spec)
      (None, 'fsdp')
    """
    params = as_arrays(params)
    if param_shardings is None:
        param_shardings = jax.tree.map(
            lambda leaf: getattr(content(leaf), "sharding", None),
            params,
            is_leaf=is_box,
        )

    def typed(path, leaf, sharding):
        if is_box(sharding):
            sharding = content(sharding)
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{path_name(path)} has the sharding {sharding}: give every parameter"
                " a NamedSharding, PartitionSpec() where it is on all devices."
            )
        own_type = NamedSharding(_explicit(sharding.mesh), sharding.spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=own_type
            ),
            leaf,
        )

    # On explicit axes shardings are part of types, and types can be had of shapes:
    # whatever `init` does, and whoever wrapped it, its results say where they are.
    typed_params = jax.tree.map_with_path(
        typed, params, param_shardings, is_leaf=is_box
    )
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    with jax.sharding.use_abstract_mesh(_explicit(mesh)):
        state = jax.eval_shape(optimizer.init, typed_params)
    return jax.tree.map(
        lambda leaf: NamedSharding(
            mesh, PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        ),
        state,
    )


def stage(
    init_fn: Callable[[optax.Params], Any],
    update_fn: Callable[..., tuple[Any, Any]],
    check_updates: Callable[[Any], None],
    takes: tuple[str, ...] = (),
    forwards: bool = False,
    jitted: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation that works on explicit and automatic meshes.

    Args:
      init_fn: from parameters to state.
      update_fn: (updates, state, **extra_args) -> (updates, state), in which
        nothing need be said about sharding.
      check_updates: raises if the updates are not what the stage works on.
      takes: extra arguments that are trees of arrays, if they are given.
      forwards: whether the function is given all other extra arguments, too.
      jitted: whether the function is jitted, as one with loops has to be: un-jitted
        loops are compiled anew on every call.

    Returns:
      The transformation.
    """

    @functools.partial(jax.jit, static_argnums=2)
    def compute(arguments, arrays, constants):
        return update_fn(*arguments, **arrays, **dict(constants))

    def init(params):
        return init_fn(as_arrays(params))

    def update(updates, state, params=None, **extra_args):
        del params
        updates = as_arrays(updates)
        check_updates(updates)
        taken = {name: extra_args.pop(name) for name in takes if name in extra_args}
        others = extra_args if forwards else {}
        arrays = {name: x for name, x in others.items() if is_traceable(x)}
        constants = tuple(item for item in others.items() if item[0] not in arrays)

        def run(updates, state, taken):
            given = taken | arrays
            if not jitted or not is_hashable(constants):
                return update_fn(updates, state, **given, **dict(constants))
            return compute((updates, state), given, constants)

        mesh = _explicit_mesh(updates)
        if mesh is None:
            return run(updates, state, taken)
        arguments = updates, state, taken
        shapes = jax.eval_shape(run, *_without_sharding(arguments))
        out_sharding = _result_shardings(*shapes, updates, state, mesh)
        return _with_automatic_axes(run, mesh, out_sharding)(*arguments)

    return optax.GradientTransformationExtraArgs(init, update)


def report(function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function whose results are few numbers, on meshes of either kind.

    On explicit axes it computes with automatic ones inside, like a `stage`, and its
    results are replicated.
    """
    mesh = _explicit_mesh(trees)
    if mesh is None:
        return function(*trees)
    on_all = NamedSharding(mesh, PartitionSpec())
    return _with_automatic_axes(function, mesh, on_all)(*trees)


def placed_like(like: Any, function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function whose results have the structure and the places of a tree."""
    mesh = _explicit_mesh(trees)
    if mesh is None:
        return function(*trees)
    out_sharding = jax.tree.map(lambda leaf: _own_sharding(leaf, mesh), like)
    return _with_automatic_axes(function, mesh, out_sharding)(*trees)


def local(value: Any) -> Any:
    """Reshards a hyper-parameter to the mesh of the stage that uses it.

    `optax.inject_hyperparams` traces it outside of the stage, where axes may be
    explicit; with the values inside it would not mix.
    """
    if not isinstance(value, jax.Array):
        return value
    mesh, own_mesh = jax.sharding.get_abstract_mesh(), jax.typeof(value).sharding.mesh
    if mesh.empty or own_mesh.empty or own_mesh == mesh:
        return value
    return jax.sharding.reshard(value, PartitionSpec())


def _explicit(mesh: Any) -> AbstractMesh:
    return AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )


def _explicit_mesh(updates: Any) -> Any:
    for leaf in jax.tree.leaves(updates):
        sharding = placement.explicit_sharding(leaf)
        if sharding is not None:
            return sharding.mesh
    return None


def _with_automatic_axes(function: Callable, mesh: Any, out_sharding: Any) -> Callable:
    """A function in which the explicit axes of a mesh are automatic.

    Inside of `shard_map` over some of the axes, these are manual and stay so.
    """
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_sharding)


def _own_sharding(leaf: Any, mesh: Any) -> NamedSharding:
    """The sharding in a leaf's type, or replicated."""
    own = placement.explicit_sharding(leaf)
    return NamedSharding(mesh, PartitionSpec()) if own is None else own


def _without_sharding(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _result_shardings(new_updates, new_state, updates, state, mesh) -> Any:
    """Shardings for the results of a stage; state keeps the types it has."""

    def named(spec):
        return NamedSharding(mesh, spec)

    def own(leaf):
        return _own_sharding(leaf, mesh)

    def of_record(record: LowRankLeaf, before):
        gradient = before.gradient if is_record(before) else content(before)
        view, sharding = record.view, own(gradient)
        spec = placement.padded(sharding.spec, len(view.shape))
        basis = named(placement.basis_spec(view, spec, mesh))
        coordinates = named(placement.coordinates_spec(view, spec, mesh))
        batch = named(placement.batch_spec(view, spec))
        return record.replace(
            gradient=sharding,
            basis=basis,
            previous_basis=basis,
            rank_one=jax.tree.map(lambda _: batch, record.rank_one),
            moved=named(PartitionSpec()),
            coordinates=record.coordinates and coordinates,
            direction=record.direction and coordinates,
        )

    def of_plain(leaf, before):
        sharding = own(before.gradient if is_record(before) else content(before))
        return jax.tree.map(lambda _: sharding, leaf)

    return map_records(of_record, of_plain, new_updates, updates), jax.tree.map(
        own, state
    )
