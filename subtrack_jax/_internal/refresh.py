"""Refreshes bases in one compiled loop per matrix size, one in memory at a time."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subtrack_jax._internal.loops import switch, unstack
from subtrack_jax._internal.matrix_view import MatrixView
from subtrack_jax.stages.transport import RankOneRotation


class Moved(NamedTuple):
    """Results of a refresh for one matrix, or with batch axes in front for a leaf."""

    basis: jax.Array
    rotation: RankOneRotation | None = None
    memory: Any = ()


class Leaf(NamedTuple):
    """A leaf whose bases are to be moved."""

    view: MatrixView
    gradient: jax.Array  # of the view's shape
    basis: jax.Array  # (..., m, r), float32 or float64
    memory: Any = ()  # the tracker's, batch axes first
    extras: Any = ()  # what else it reads, batch axes first


# For one matrix: (gradient, basis, memory, extras) -> moved.
Move = Callable[[jax.Array, jax.Array, Any, Any], Moved]


def refresh(move: Move, leaves: Sequence[Leaf]) -> list[Moved]:
    """Moves the bases of all leaves, each only if what goes in and out is finite.

    On one device all matrices of a size, of whatever leaf, go through the same loop:
    a model has a few sizes and hundreds of matrices, and a loop is compiled once. On
    a mesh every leaf has a loop of its own (`MatrixView.map`), as two leaves of a
    size may be split along different sides.

    Args:
      move: of one matrix.
      leaves: the leaves.

    Returns:
      What has moved, of every leaf.
    """
    move = functools.partial(_move_if_finite, move)
    if any(jax.typeof(leaf.gradient).sharding.mesh.size > 1 for leaf in leaves):
        of_one = lambda view, gradient, *rest: move(view.wide(gradient), *rest)
        return [leaf.view.map(of_one, leaf.gradient, *leaf[2:]) for leaf in leaves]
    groups: dict[Any, list[int]] = {}
    for k, leaf in enumerate(leaves):
        size = (leaf.view.basis_shape[-2:], leaf.view.coordinates_shape[-1])
        dtypes = (leaf.gradient.dtype, leaf.basis.dtype)
        groups.setdefault((size, dtypes), []).append(k)
    results: dict[int, Moved] = {}
    for members in groups.values():
        found = _in_one_loop(move, [leaves[k] for k in members])
        results |= dict(zip(members, found, strict=True))
    return [results[k] for k in range(len(leaves))]


def knows_rotations(move: Move, leaves: Sequence[Leaf]) -> list[bool]:
    """Whether the moves of each leaf come with a rotation of rank one."""
    answers: dict[Any, bool] = {}
    found = []
    for leaf in leaves:
        axes = len(leaf.view.batch_axes)
        wide = (leaf.view.basis_shape[-2], leaf.view.coordinates_shape[-1])
        shapes = jax.tree.map(
            lambda x, axes=axes: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype),
            (leaf.basis, leaf.memory, leaf.extras),
        )
        key = (wide, jax.tree.structure(shapes), *jax.tree.leaves(shapes))
        if key not in answers:
            gradient = jax.ShapeDtypeStruct(wide, leaf.basis.dtype)
            moved = jax.eval_shape(move, gradient, *shapes)
            answers[key] = moved.rotation is not None
        found.append(answers[key])
    return found


def _move_if_finite(
    move: Move, gradient: jax.Array, basis: jax.Array, memory: Any, extras: Any
) -> Moved:
    gradient = gradient.astype(basis.dtype)
    moved = move(gradient, basis, memory, extras)
    # The largest entry is needed anyway, and NaN if one is.
    usable = jnp.isfinite(jnp.max(jnp.abs(gradient)))
    usable &= jnp.isfinite(jnp.max(jnp.abs(moved.basis)))
    keep = lambda new, old: jnp.where(usable, new.astype(old.dtype), old)
    return Moved(
        keep(moved.basis, basis),
        jax.tree.map(lambda leaf: jnp.where(usable, leaf, 0), moved.rotation),
        jax.tree.map(keep, moved.memory, memory),
    )


def _in_one_loop(move: Move, leaves: Sequence[Leaf]) -> list[Moved]:
    """Moves the bases of leaves whose matrices have one size."""
    counts = [math.prod(leaf.view.batch_shape) for leaf in leaves]
    leaf_of = np.repeat(np.arange(len(leaves)), counts)
    index_of = np.concatenate([np.arange(count) for count in counts])

    picks = [
        functools.partial(_pick, leaf.view, leaf.gradient, leaf[2:]) for leaf in leaves
    ]

    def move_one(which):
        leaf, index = which
        return move(*switch(leaf, [functools.partial(pick, index) for pick in picks]))

    moved = jax.lax.map(move_one, (leaf_of, index_of))

    def shaped(leaf, part):
        batch = leaf.view.batch_shape
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), part)

    return list(map(shaped, leaves, unstack(moved, counts)))


@functools.partial(jax.jit, static_argnums=0)
def _pick(view: MatrixView, gradient: jax.Array, stacks: Any, index: jax.Array) -> Any:
    """One matrix of a leaf by its flat index; traced once for leaves that are alike."""
    axes = len(view.batch_axes)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), stacks)
    return view.wide_at(gradient, index), *jax.tree.map(lambda x: x[index], flat)
