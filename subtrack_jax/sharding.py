"""Stages on meshes whose axes are explicit, and where low-rank state lives.

On automatic meshes the compiler places everything and this module does nothing
but allocate state. On explicit ones ("sharding in types") a product over a
sharded axis has no type of its own; stages therefore compute with automatic
axes inside and give every result the type decided here:

- what has the shape of a gradient keeps the gradient's sharding;
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
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from subtrack_jax.leaves import content, is_box, map_leaves, path_name, state_dtype
from subtrack_jax.linear_algebra import whole
from subtrack_jax.matrix_view import MatrixView
from subtrack_jax.record import LowRankLeaf, is_record, map_records


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
    reads from metadata, `nnx.get_partition_spec`, calls it whole. Use this instead.

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
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation that works on explicit and automatic meshes.

    Args:
      init_fn: from parameters to state.
      update_fn: (updates, state, **extra_args) -> (updates, state), in which
        nothing need be said about sharding.
      check_updates: raises if the updates are not what the stage works on.
      takes: extra arguments that are trees of arrays, if they are given.

    Returns:
      The transformation.
    """

    def update(updates, state, params=None, **extra_args):
        del params
        check_updates(updates)
        taken = {name: extra_args.pop(name) for name in takes if name in extra_args}

        def run(updates, state, taken):
            return update_fn(updates, state, **taken, **extra_args)

        mesh = _explicit_mesh(updates)
        if mesh is None:
            return run(updates, state, taken)
        arguments = updates, state, taken
        shapes = jax.eval_shape(run, *_without_sharding(arguments))
        out_sharding = _result_shardings(*shapes, updates, state, mesh)
        return jax.sharding.auto_axes(run, out_sharding=out_sharding)(*arguments)

    return optax.GradientTransformationExtraArgs(init_fn, update)


def report(function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function whose results are few numbers, on meshes of either kind.

    On explicit axes it computes with automatic ones inside, like a `stage`, and its
    results are whole on every device.
    """
    mesh = _explicit_mesh(trees)
    if mesh is None:
        return function(*trees)
    on_all = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.auto_axes(function, out_sharding=on_all)(*trees)


def placed_like(like: Any, function: Callable[..., Any], *trees: Any) -> Any:
    """Calls a function whose results have the structure and the places of a tree."""
    mesh = _explicit_mesh(trees)
    if mesh is None:
        return function(*trees)
    place = lambda leaf: (
        _explicit_sharding(leaf) or NamedSharding(mesh, PartitionSpec())
    )
    out_sharding = jax.tree.map(place, like)
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*trees)


def basis_like(leaf: Any, view: MatrixView, dtype: Any) -> jax.Array:
    """Columns of the identity: orthonormal before the first gradient is seen."""
    *batch, m, rank = view.basis_shape
    eye = jnp.broadcast_to(jnp.eye(m, rank, dtype=dtype), (*batch, m, rank))
    return place(eye, leaf, lambda spec, mesh: _basis_spec(view, spec, mesh))


def coordinates_like(leaf: Any, view: MatrixView, dtype: Any) -> Any:
    """Zeros of the shape of a leaf's coordinates."""
    zeros = jnp.zeros(view.coordinates_shape, dtype)
    return place(zeros, leaf, lambda spec, mesh: _coordinates_spec(view, spec, mesh))


def norms_like(params: optax.Params, views: Any) -> optax.Updates:
    """One zero for each matrix of the low-rank leaves of a tree."""

    def zeros(leaf, view):
        value = jnp.zeros(view.batch_shape, state_dtype(leaf.dtype))
        return place(value, leaf, lambda spec, _: _batch_spec(view, spec))

    return map_leaves(zeros, lambda _: optax.MaskedNode(), params, views)


def local(value: Any) -> Any:
    """A hyper-parameter as the stage that uses it needs it.

    `optax.inject_hyperparams` traces it outside of the stage, where axes may be
    explicit; with the values inside it would not mix.
    """
    if not isinstance(value, jax.Array):
        return value
    mesh, own_mesh = jax.sharding.get_abstract_mesh(), jax.typeof(value).sharding.mesh
    if mesh.empty or own_mesh.empty or own_mesh == mesh:
        return value
    return jax.sharding.reshard(value, PartitionSpec())


def whole_basis(basis: jax.Array, view: MatrixView) -> jax.Array:
    """Asks for a basis whole on every device, where that saves communication.

    A basis is split further than the rows of the gradient it meets in a product, so
    one of them has to move. The compiler by itself exchanges the gradient, m n / D
    numbers on each of D devices; a whole basis, of m r, lets it add up coordinates,
    of r n, in place. Where r D > m, on large meshes, the former is less.
    """
    m, rank = view.basis_shape[-2:]
    is_less = rank * jax.typeof(basis).sharding.mesh.size <= m
    return whole(basis) if is_less else basis


def whole_rank(coordinates: jax.Array) -> jax.Array:
    """Asks for coordinates that are not split along their rank, for products.

    Moments are where no mesh axis divides their columns. A product with them would
    have the compiler gather a gradient of m n numbers; coordinates have r n.
    """
    return whole(coordinates, axes=(-2,))


def _explicit(mesh: Any) -> AbstractMesh:
    return AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )


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


def place(value: jax.Array, leaf: Any, spec_of: Callable) -> jax.Array:
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
        gradient = before.gradient if is_record(before) else content(before)
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

    def of_plain(leaf, before):
        sharding = own(before.gradient if is_record(before) else content(before))
        return jax.tree.map(lambda _: sharding, leaf)

    return map_records(of_record, of_plain, new_updates, updates), jax.tree.map(
        own, state
    )


def _padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    return (*spec, *(None,) * (ndim - len(spec)))


def _batch_spec(view: MatrixView, spec: tuple[Any, ...]) -> PartitionSpec:
    return PartitionSpec(*(spec[axis] for axis in view.batch_axes))


def _basis_spec(view: MatrixView, spec: tuple[Any, ...], mesh: Any) -> PartitionSpec:
    rows, columns = view.row_axes, view.column_axes
    own, other = (rows, columns) if view.basis_on_rows else (columns, rows)
    long, short = _split(view.basis_shape[-2:], spec, mesh, own + other)
    return PartitionSpec(*_batch_spec(view, spec), long, short)


def _coordinates_spec(
    view: MatrixView, spec: tuple[Any, ...], mesh: Any
) -> PartitionSpec:
    rows, columns = view.row_axes, view.column_axes
    own, other = (columns, rows) if view.basis_on_rows else (rows, columns)
    long, short = _split(view.coordinates_shape[:-3:-1], spec, mesh, own + other)
    return PartitionSpec(*_batch_spec(view, spec), short, long)


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
