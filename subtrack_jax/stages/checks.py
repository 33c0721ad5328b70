"""Checks of a stage's updates and state: order of stages, shapes, kinds.

A checkpoint of another rank, side or optimizer can have the structure that is
expected, and `flax.serialization` restores it without a look at shapes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax._internal.named_leaves import path_name
from subtrack_jax._internal.trees import is_masked
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.record import is_record, map_records

_ADVICE = (
    "the state is of another optimizer, rank, side or tree of parameters; restore the"
    " one that belongs to these, or begin with init"
)


def expect_records(
    stage: str, low_rank: LowRank, needs: str
) -> Callable[[optax.Updates], None]:
    """Builds the check that a stage is chained after the stages it needs.

    Args:
      stage: name of the stage that asks.
      low_rank: which leaves must be records.
      needs: field of the record that the stage works from.

    Returns:
      A function of the stage's updates that raises a TypeError naming the first
      leaf at fault and the stage it has missed.
    """
    before = {
        "basis": "track_subspace",
        "coordinates": "project",
        "direction": "scale_by_projection_aware_adam or on_coordinates",
    }[needs]

    if not isinstance(low_rank, LowRank):
        raise TypeError(f"{stage} takes a LowRank first, was given {low_rank!r}.")

    def check(path, leaf, view):
        if is_record(leaf) and leaf.view != view:
            raise TypeError(
                f"{stage} was given {path_name(path)} tracked as {leaf.view}, which"
                f" its own LowRank sees as {view}: give all stages the same one."
            )
        reached = is_record(leaf) and getattr(leaf, needs) is not None
        if view is not None and not reached:
            raise TypeError(
                f"{stage} was given {path_name(path)} without its {needs}: chain"
                f" {before} before it, with the same LowRank."
            )

    def check_updates(updates):
        gradients = map_records(lambda record: record.gradient, lambda g: g, updates)
        views = low_rank.views(gradients)
        jax.tree.map_with_path(check, updates, views, is_leaf=is_record)

    return check_updates


def expect_state(stage: str, kind: type, state: Any) -> None:
    """Raises a TypeError unless a stage is given a state of its own kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{stage} was given {type(state).__name__} in place of {kind.__name__}:"
            f" {_ADVICE}."
        )


def expect_parts(count: int, state: Any) -> None:
    """Raises a ValueError unless a chain's state has a part for each stage."""
    if len(state) != count:
        raise ValueError(
            f"a chain of {count} stages was given a state of {len(state)}: {_ADVICE}."
        )


def expect_shapes(
    stage: str,
    field: str,
    found: Any,
    updates: Any,
    views: Any,
    shape_of: Callable[[MatrixView], tuple[int, ...] | None],
) -> None:
    """Raises unless the shapes of a state's field match the updates.

    Args:
      stage: name of the stage that asks.
      field: name of the field.
      found: the field: an array for each low-rank leaf, `optax.MaskedNode` for others.
      updates: arrays or records.
      views: result of `LowRank.views`.
      shape_of: from a view to the shape that belongs to it, or None.

    Raises:
      ValueError: naming the leaf, its shape and the one that was expected.
    """
    structure: Any
    nodes, structure = jax.tree.flatten_with_path(updates, is_leaf=is_record)
    try:
        entries = structure.flatten_up_to(found)
        if not all(map(_is_one_leaf, entries)):
            raise ValueError("it has trees in place of leaves")
    except ValueError as error:
        expect_gradients(updates, found)
        raise ValueError(
            f"{stage} was given a state whose {field} has not the leaves of the"
            f" updates: {_ADVICE} ({error})."
        ) from error
    for (path, _), view, entry in zip(
        nodes, structure.flatten_up_to(views), entries, strict=True
    ):
        expected = None if view is None else shape_of(view)
        shape = None if is_masked(entry) else jnp.shape(entry)
        if shape != expected:
            raise ValueError(
                f"{stage} was given a state whose {field} of {path_name(path)} has the"
                f" shape {shape}, where {expected} is expected (None: no {field}):"
                f" {_ADVICE}."
            )


def expect_rule_state(stage: str, found: Any, expected: Any) -> None:
    """Raises a ValueError unless a rule's state has the shapes of a new one.

    Args:
      stage: name of the stage that asks.
      found: the state.
      expected: shapes of the state that the rule's `init` makes.
    """
    expect_state(stage, type(expected), found)
    shapes, wanted = map(_named, (found, expected))
    if shapes.keys() != wanted.keys():
        extra, missing = shapes.keys() - wanted.keys(), wanted.keys() - shapes.keys()
        raise ValueError(
            f"{stage} was given a state with {sorted(extra) or 'nothing'} too much and"
            f" {sorted(missing) or 'nothing'} too little: {_ADVICE}."
        )
    for name, leaf in shapes.items():
        if jnp.shape(leaf) != wanted[name].shape:
            raise ValueError(
                f"{stage} was given a state whose {name} has the shape"
                f" {jnp.shape(leaf)}, where {wanted[name].shape} is expected:"
                f" {_ADVICE}."
            )


def expect_gradients(updates: Any, state: Any) -> None:
    """Raises if a parameter of `init` has no gradient.

    Args:
      updates: the gradients, `None` where there is none.
      state: tree of the same structure, with an entry per parameter.

    Raises:
      ValueError: naming the leaves.
    """
    is_hole = lambda node: node is None or is_masked(node)
    nodes = jax.tree.leaves_with_path(updates, is_leaf=is_hole)
    missing = {path for path, node in nodes if node is None}
    if not missing:
        return
    kept = [path for path, _ in jax.tree.leaves_with_path(state, is_leaf=is_masked)]
    if names := [path_name(path) for path in kept if path in missing]:
        raise ValueError(
            f"The gradient of {', '.join(names)} is None, and init was given an array:"
            " give init what is differentiated, such as"
            " eqx.filter(model, eqx.is_inexact_array) of an Equinox model."
        )


def _is_one_leaf(entry: Any) -> bool:
    return is_masked(entry) or jax.tree_util.all_leaves([entry])


def _named(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
