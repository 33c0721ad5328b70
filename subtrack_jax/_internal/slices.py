"""Loop that overwrites the slices of large arrays in place.

Updates of every step take it: on one device and on meshes one loop per leaf, each trip
large enough to occupy the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier

from subtrack_jax._internal import matrix_loops
from subtrack_jax._internal.loops import fori_loop, hold

Tree = TypeVar("Tree")


class Division(NamedTuple):
    """Division of an axis of a leaf into slices for the trips of a loop.

    Attributes:
      axis: the axis.
      pieces: number of shards along it, which stay side by side in every slice.
      trips: number of slices.
    """

    axis: int
    pieces: int
    trips: int

    def divided(self, x: jax.Array, axis: int) -> jax.Array:
        """Splits an axis into (pieces, trips, rest), if it has pieces.

        An axis without is not split: XLA copies arrays for axes of length 1.
        """
        if self.pieces == 1:
            return x
        sizes = self.pieces, self.trips, x.shape[axis] // (self.pieces * self.trips)
        return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])

    def pick(self, x: jax.Array, k: jax.Array, axis: int) -> jax.Array:
        """The slice of one trip of a divided array."""
        if self.pieces == 1:
            size = x.shape[axis] // self.trips
            return jax.lax.dynamic_slice_in_dim(x, k * size, size, axis)
        part = jax.lax.dynamic_index_in_dim(x, k, axis + 1, keepdims=False)
        return part.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])

    def put(self, x: jax.Array, part: jax.Array, k: jax.Array, axis: int) -> jax.Array:
        """Overwrites the slice of one trip of a divided array."""
        if self.pieces == 1:
            start = k * part.shape[axis]
            return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
        part = part.reshape(*x.shape[: axis + 1], *x.shape[axis + 2 :])
        return jax.lax.dynamic_update_index_in_dim(x, part, k, axis + 1)


def divide(leaf: jax.Array, axis: int, work: int) -> Division:
    """Divides an axis of a leaf into the smallest slices that occupy a device.

    Args:
      leaf: a gradient.
      axis: of it.
      work: number of coordinates of all of the leaf.

    Returns:
      A division, of one trip if the leaf is small.
    """
    size = leaf.shape[axis]
    pieces = matrix_loops.possible_pieces(size, leaf)
    most = size // pieces
    found = [
        t
        for t in range(1, most + 1)
        if most % t == 0 and work // t >= matrix_loops.LARGE
    ]
    return Division(axis, pieces, max(found, default=1))


def overwrite_slices(
    function: Callable[[Tree, Any, jax.Array], Tree],
    division: Division,
    carried: Tree,
    axes: Any,
    others: Any = None,
) -> Tree:
    """Overwrites the slices of arrays by functions of themselves sequentially.

    Each slice is read once and written once: of several fusions that read a stack
    while another one writes it, XLA copies the stack on every trip.

    Args:
      function: from slices of `carried` and of `others`, and the places of the slice
        along the axis, to new slices of the same types.
      division: of an axis that all arrays have.
      carried: the arrays.
      axes: where each of them has that axis.
      others: arrays to read that have the axis in front.

    Returns:
      Arrays like `carried`, in their memory.
    """
    places = jnp.arange(jax.tree.leaves(carried)[0].shape[jax.tree.leaves(axes)[0]])
    divided = lambda tree: jax.tree.map(lambda x: division.divided(x, 0), tree)
    others, places = divided(others), division.divided(places, 0)

    def body(k, stacks):
        def pick(x, axis=0):
            return division.pick(x, k, axis)

        parts = hold(barrier(jax.tree.map(pick, stacks, axes)), k < 0)
        parts = barrier(function(parts, jax.tree.map(pick, others), pick(places)))
        put = lambda x, part, axis: division.put(x, part, k, axis)
        return jax.tree.map(put, stacks, parts, axes)

    stacks = fori_loop(
        division.trips, body, jax.tree.map(division.divided, carried, axes)
    )
    return jax.tree.map(lambda new, old: new.reshape(old.shape), stacks, carried)
