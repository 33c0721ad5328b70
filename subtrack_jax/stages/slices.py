"""Runs a chain of stages on slices of large leaves, one slice in memory at a time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal import matrix_loops
from subtrack_jax._internal.boxes import content, is_box
from subtrack_jax._internal.slices import Division, divide, overwrite_slices
from subtrack_jax._internal.trees import is_masked
from subtrack_jax.stages.checks import expect_parts
from subtrack_jax.stages.record import is_record, map_records
from subtrack_jax.stages.stage import stage

# From slices of a leaf, of its part of the state, and from their rows to new ones.
_Update = Callable[[Any, list[Any], jax.Array | None], tuple[Any, list[Any]]]


def chain_in_slices(
    before: tuple[optax.GradientTransformation, ...],
    stages: tuple[optax.GradientTransformation, ...],
    after: tuple[optax.GradientTransformation, ...],
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` whose middle part runs on slices of large leaves sequentially.

    Coordinates, directions, decoded moments and the update exist for one slice at a
    time: for a few matrices of a stack, for some rows of an embedding in eight bits.
    State and results are those of the chain.

    Args:
      before: stages up to the one that makes records.
      stages: from records to updates, on each matrix by itself.
      after: ordinary transformations.

    Returns:
      A transformation with the state of the chain.
    """
    parts = optax.chain(*before), _in_slices(stages), optax.chain(*after)
    first, second = len(before), len(before) + len(stages)

    def update_fn(updates, state, params=None, **extra_args):
        expect_parts(second + len(after), state)
        own = state[:first], state[first:second], state[second:]
        new_state: tuple[Any, ...] = ()
        for part, old in zip(parts, own, strict=True):
            updates, new = part.update(updates, old, params, **extra_args)
            new_state += new
        return updates, new_state

    init_fn = optax.chain(*before, *stages, *after).init
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _in_slices(
    stages: tuple[optax.GradientTransformation, ...],
) -> optax.GradientTransformationExtraArgs:
    """Chains stages from records to updates, with a loop for each large leaf."""
    chain = optax.chain(*stages)

    def update_all(updates, state, **extra_args):
        nodes, structure = jax.tree.flatten(updates, is_leaf=_is_node)
        values, structure_of_state = jax.tree.flatten(state, is_leaf=_is_node)
        owners = _owners(chain, state, structure)

        def update(chosen: dict[int, Any], values: Sequence[Any], **rows):
            """Updates the chosen leaves; all others are masked."""
            absent = optax.MaskedNode()
            masked = [chosen.get(k, absent) for k in range(len(nodes))]
            own = [
                x if owner in (None, *chosen) else absent
                for x, owner in zip(values, owners, strict=True)
            ]
            new, new_state = chain.update(
                structure.unflatten(masked),
                structure_of_state.unflatten(own),
                **extra_args,
                **rows,
            )
            new_values = jax.tree.leaves(new_state, is_leaf=_is_node)
            return structure.flatten_up_to(new), new_values

        divisions = _divisions(nodes, values, owners)
        rest = {k: node for k, node in enumerate(nodes) if k not in divisions}
        new, new_values = update(rest, values)
        for k, division in divisions.items():
            places = [j for j, owner in enumerate(owners) if owner == k]

            def update_slice(node, own, rows, k=k, places=places):
                every = list(values)
                for j, value in zip(places, own, strict=True):
                    every[j] = value
                rows = {} if rows is None else {"slice_rows": rows}
                new, every = update({k: node}, every, **rows)
                return new[k], [every[j] for j in places]

            own = [values[j] for j in places]
            new[k], own = _looped(update_slice, division, nodes[k], own)
            for j, value in zip(places, own, strict=True):
                new_values[j] = value
        return structure.unflatten(new), structure_of_state.unflatten(new_values)

    def is_divided(updates, state):
        nodes, structure = jax.tree.flatten(updates, is_leaf=_is_node)
        if all(x.size < matrix_loops.LARGE for x in jax.tree.leaves(updates)):
            return False
        values = jax.tree.leaves(state, is_leaf=_is_node)
        return bool(_divisions(nodes, values, _owners(chain, state, structure)))

    in_loops = stage(
        chain.init,
        update_all,
        check_updates=lambda _: None,  # the stages check
        forwards=True,
        widens=True,
        keeps_boxes=True,
    )
    no_box = jax.tree.structure(0)

    def update_fn(updates, state, params=None, **extra_args):
        if not is_divided(updates, state):
            return chain.update(updates, state, params, **extra_args)
        bare = map_records(lambda x: x.replace(box=no_box), lambda g: g, updates)
        new, state = in_loops.update(bare, state, params, **extra_args)
        boxed = lambda record, x: jax.tree.unflatten(record.box, [x])
        return map_records(boxed, lambda _, x: x, updates, new), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _divisions(
    nodes: Sequence[Any], values: Sequence[Any], owners: Sequence[int | None]
) -> dict[int, Division]:
    """Divisions of the leaves that take more than one slice.

    Plain leaves take one, as their update is elementwise, unless it decodes moments.
    """
    coded = {
        owner
        for x, owner in zip(values, owners, strict=True)
        if not is_masked(x) and content(x).dtype in (jnp.int8, jnp.uint8)
    }
    divisions = {}
    for k, node in enumerate(nodes):
        if is_record(node):
            if node.view.batch_axes:
                axis = node.view.batch_axes[0]
                size = node.view.coordinates_size
                divisions[k] = divide(node.gradient, axis, size)
        elif k in coded and content(node).ndim > 1:
            divisions[k] = divide(content(node), 0, content(node).size)
    return {k: each for k, each in divisions.items() if each.trips > 1}


def _looped(
    update: _Update, division: Division, node: Any, values: list[Any]
) -> tuple[Any, list[Any]]:
    """Updates a leaf in slices.

    Args:
      update: of slices.
      division: of an axis of the leaf.
      node: the leaf: a record, or a plain leaf in its box.
      values: its part of the state, the divided axis in front.

    Returns:
      The update and the new values.
    """
    axis = division.axis
    axes = [jax.tree.map(lambda _: 0, value) for value in values]
    if is_record(node):
        shape = list(node.view.shape)
        shape[axis] //= division.trips
        view = dataclasses.replace(node.view, shape=tuple(shape))

        def update_record(carried, fields, _):
            gradient, own = carried
            part = node.replace(view=view, gradient=gradient, **fields)
            return update(part, own, None)

        carried = node.gradient, values
        return overwrite_slices(
            update_record, division, carried, (axis, axes), node.fields
        )
    # Rows are dithered by their place in the whole leaf.
    has_rows = content(node).ndim == 2
    return overwrite_slices(
        lambda carried, _, rows: update(*carried, rows if has_rows else None),
        division,
        (node, values),
        (jax.tree.map(lambda _: axis, node), axes),
    )


def _owners(
    chain: optax.GradientTransformation, state: Any, structure: Any
) -> list[int | None]:
    """Index of the parameter that each leaf of a state belongs to, None for others."""
    owners = optax.tree.map_params(
        chain,
        lambda _, k: k,
        state,
        structure.unflatten(range(structure.num_leaves)),
        transform_non_params=lambda _: -1,
        is_leaf=_is_node,
    )
    return [None if k < 0 else k for k in jax.tree.leaves(owners)]


def _is_node(x: Any) -> bool:
    return is_record(x) or is_box(x) or is_masked(x)
