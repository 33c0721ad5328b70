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

Move = Callable[[jax.Array, jax.Array], tuple[jax.Array, RankOneRotation | None]]
Result = tuple[jax.Array, RankOneRotation | None]


class Leaf(NamedTuple):
    """A leaf whose bases are to be moved."""

    view: MatrixView
    gradient: jax.Array  # of the view's shape
    basis: jax.Array  # (..., m, r), float32 or float64


def refresh(move: Move, leaves: Sequence[Leaf]) -> list[Result]:
    """Moves the bases of all leaves, each only if what goes in and out is finite.

    On one device all matrices of a size, of whatever leaf, go through the same loop:
    a model has a few sizes and hundreds of matrices, and a loop is compiled once. On
    a mesh every leaf has a loop of its own (`MatrixView.map`), as two leaves of a
    size may be split along different sides.

    Args:
      move: (gradient, basis) -> (new basis, rotation or None), for one matrix.
      leaves: the leaves.

    Returns:
      The new basis and the rotation of every leaf.
    """
    move = functools.partial(_move_if_finite, move)
    if any(jax.typeof(leaf.gradient).sharding.mesh.size > 1 for leaf in leaves):
        return [leaf.view.map(move, leaf.gradient, leaf.basis) for leaf in leaves]
    groups: dict[Any, list[int]] = {}
    for k, (view, gradient, basis) in enumerate(leaves):
        size = (view.basis_shape[-2:], view.coordinates_shape[-1])
        groups.setdefault((size, gradient.dtype, basis.dtype), []).append(k)
    results: dict[int, Result] = {}
    for members in groups.values():
        found = _in_one_loop(move, [leaves[k] for k in members])
        results |= dict(zip(members, found, strict=True))
    return [results[k] for k in range(len(leaves))]


def _move_if_finite(move: Move, gradient: jax.Array, basis: jax.Array) -> Result:
    gradient = gradient.astype(basis.dtype)
    new_basis, rotation = move(gradient, basis)
    usable = jnp.all(jnp.isfinite(gradient)) & jnp.all(jnp.isfinite(new_basis))
    return (
        jnp.where(usable, new_basis.astype(basis.dtype), basis),
        jax.tree.map(lambda leaf: jnp.where(usable, leaf, 0), rotation),
    )


def _in_one_loop(move: Move, leaves: Sequence[Leaf]) -> list[Result]:
    """Moves the bases of leaves whose matrices have one size."""
    counts = [math.prod(leaf.view.batch_shape) for leaf in leaves]
    leaf_of = np.repeat(np.arange(len(leaves)), counts)
    index_of = np.concatenate([np.arange(count) for count in counts])

    def pick_from(leaf):
        bases = leaf.basis.reshape(-1, *leaf.basis.shape[-2:])
        return lambda index: (leaf.view.wide_at(leaf.gradient, index), bases[index])

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
