"""Stage wrapper: metadata boxes, hyper-parameters, meshes, compilation.

A stage's own function sees bare arrays and records on automatic axes. What it needs
for that is done here, once:

- boxes with metadata (Flax) are taken off the updates and put on again;
- hyper-parameters that `jax.tree_util.Partial` binds to the function are resharded
  to the mesh inside;
- on explicit meshes ("sharding in types") every result gets the type that
  `placement` decides;
- the function is jitted: loops that are not would be compiled anew on every call.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from subtrack_jax._internal import mesh as meshes
from subtrack_jax._internal import placement
from subtrack_jax._internal.boxes import is_box, unboxed
from subtrack_jax._internal.trees import as_arrays, is_hashable, is_traceable
from subtrack_jax.stages.record import LowRankLeaf, is_record, map_records, widened


def stage(
    init_fn: Callable[[optax.Params], Any],
    update_fn: Callable[..., tuple[Any, Any]],
    check_updates: Callable[[Any], None],
    takes: tuple[str, ...] = (),
    forwards: bool = False,
    jitted: bool = True,
    widens: bool = False,
    keeps_boxes: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds a transformation that works on explicit and automatic meshes.

    Args:
      init_fn: from parameters, in their boxes, to state without any.
      update_fn: (updates, state, **extra_args) -> (updates, state), in which
        nothing need be said about sharding and boxes. Hyper-parameters that may be
        arrays are its arguments, bound by `jax.tree_util.Partial`.
      check_updates: raises if the updates are not what the stage works on.
      takes: extra arguments that are trees of arrays, if they are given.
      forwards: whether the function is given all other extra arguments, too.
      jitted: whether the function is jitted, as one with loops has to be.
      widens: whether gradients are widened to the parameters' dtype first.
      keeps_boxes: whether the function is given updates and state as they come.

    Returns:
      The transformation.
    """

    def compute(*arguments, **extra_args):
        local_fn = jax.tree.map(meshes.local, update_fn)
        return local_fn(*arguments, **extra_args)

    @functools.partial(jax.jit, static_argnums=2)
    def compute_jitted(arguments, arrays, constants):
        return compute(*arguments, **arrays, **dict(constants))

    def init(params):
        return init_fn(as_arrays(params))

    def update(updates, state, params=None, **extra_args):
        boxed = as_arrays(updates)
        bare = unboxed(boxed)
        check_updates(bare)
        updates = boxed if keeps_boxes else bare
        if widens:
            updates = widened(updates, params)
        taken = {
            name: unboxed(extra_args.pop(name)) for name in takes if name in extra_args
        }
        others = extra_args if forwards else {}
        arrays = {name: x for name, x in others.items() if is_traceable(x)}
        constants = tuple(item for item in others.items() if item[0] not in arrays)

        def run(updates, state, taken):
            given = taken | arrays
            if not jitted or not is_hashable(constants):
                return compute(updates, state, **given, **dict(constants))
            return compute_jitted((updates, state), given, constants)

        mesh = meshes.explicit_mesh(updates)
        if mesh is not None:
            replicated = NamedSharding(mesh, PartitionSpec())
            inside = meshes.with_automatic_axes(run, mesh, replicated)
            shapes = jax.eval_shape(inside, updates, state, taken)
            out_sharding = _result_shardings(*shapes, updates, state, mesh)
            run = meshes.with_automatic_axes(run, mesh, out_sharding)
        new_updates, new_state = run(updates, state, taken)
        if not keeps_boxes:
            new_updates = _boxed_like(boxed, new_updates)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _boxed_like(updates: Any, new_updates: Any) -> Any:
    """Puts results into the boxes of the updates; records carry their own."""

    def boxed(before, node):
        if is_record(node):
            return (
                node
                if is_record(before)
                else node.replace(box=jax.tree.structure(before))
            )
        box = before.box if is_record(before) else jax.tree.structure(before)
        return jax.tree.unflatten(box, [node])

    is_leaf = lambda node: is_record(node) or is_box(node)
    return jax.tree.map(boxed, updates, new_updates, is_leaf=is_leaf)


def _result_shardings(new_updates, new_state, updates, state, mesh) -> Any:
    """Shardings of a stage's results; those of its state do not change."""

    def named(spec):
        return NamedSharding(mesh, spec)

    def own(leaf):
        return meshes.own_sharding(leaf, mesh)

    def own_of_gradient(before):
        return own(before.gradient if is_record(before) else before)

    def of_record(record: LowRankLeaf, before):
        view, sharding = record.view, own_of_gradient(before)
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

    of_plain = lambda _, before: own_of_gradient(before)
    updates_shardings = map_records(of_record, of_plain, new_updates, updates)
    return updates_shardings, jax.tree.map(own, state)
