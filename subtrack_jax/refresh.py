"""Moving the bases of a tree: little to compile, and the room of one matrix."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subtrack_jax.matrix_view import MatrixView
from subtrack_jax.rotation import RankOneRotation


class Moved(NamedTuple):
    """What a refresh gives for one matrix, or with batch axes in front for a leaf."""

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


# Of one matrix: (gradient, basis, memory, extras) -> what has moved.
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


def _move_if_finite(
    move: Move, gradient: jax.Array, basis: jax.Array, memory: Any, extras: Any
) -> Moved:
    gradient = gradient.astype(basis.dtype)
    moved = move(gradient, basis, memory, extras)
    usable = jnp.all(jnp.isfinite(gradient)) & jnp.all(jnp.isfinite(moved.basis))
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

    def pick_from(leaf):
        axes = len(leaf.view.batch_shape)
        stacks = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), leaf[2:])
        return lambda index: (
            leaf.view.wide_at(leaf.gradient, index),
            *jax.tree.map(lambda x: x[index], stacks),
        )

    picks = [pick_from(leaf) for leaf in leaves]
    moved = jax.lax.map(
        lambda which: move(*jax.lax.switch(which[0], picks, which[1])),
        (leaf_of, index_of),
    )

    def part_of(leaf, count, end):
        return jax.tree.map(
            lambda x: x[end - count : end].reshape(
                *leaf.view.batch_shape, *x.shape[1:]
            ),
            moved,
        )

    return list(map(part_of, leaves, counts, itertools.accumulate(counts)))
