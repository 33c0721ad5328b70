"""Loops over the matrices of leaves: sequential or batched.

What a loop saves is compile time (one matrix compiles in a third of the time of a
stack) and memory in between; what it costs is one program after another on a device
that could do more. Hence three functions:

| function       | for             | one device           | mesh                     |
|----------------|-----------------|----------------------|--------------------------|
| `map_matrices` | refreshes       | one loop per size of | one loop per leaf, as    |
|                |                 | matrix, over leaves  | sides may be split apart |
| `map_stack`    | reports         | one loop per leaf    | one loop per leaf        |
| `map_large`    | products of     | no loop              | one loop per leaf if its |
|                | every step      |                      | matrices are large       |

On meshes no loop runs along an axis that may be split (`map_stack`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from subtrack_jax._internal.loops import switch, unstack
from subtrack_jax._internal.matrix_view import MatrixView

# Number of coordinates of one matrix that are enough to occupy a device.
LARGE = 2**20


class Stack(NamedTuple):
    """Matrices of one leaf, with other arrays per matrix.

    Attributes:
      view: how the leaf is seen as matrices.
      leaf: array of the view's shape.
      others: a tuple of trees of arrays, batch axes first.
    """

    view: MatrixView
    leaf: jax.Array
    others: tuple[Any, ...]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes and dtypes of one matrix, (m, n), and of its others."""
        axes = len(self.view.batch_axes)
        wide = (self.view.basis_shape[-2], self.view.coordinates_shape[-1])
        return (
            jax.ShapeDtypeStruct(wide, self.leaf.dtype),
            *jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), self.others
            ),
        )


def map_matrices(function: Callable[..., Any], stacks: Sequence[Stack]) -> list[Any]:
    """Calls a function on every wide matrix, one in memory at a time.

    A model has a few sizes of matrices and hundreds of them, and a loop for each size
    is compiled once.

    Args:
      function: from a matrix (m, n) and one entry of each of the others.
      stacks: the leaves.

    Returns:
      What the function returns, for every leaf, batch axes first.
    """
    if any(jax.typeof(stack.leaf).sharding.mesh.size > 1 for stack in stacks):
        of_one = lambda view, leaf, *others: function(view.wide(leaf), *others)
        return [map_stack(of_one, view, leaf, *others) for view, leaf, others in stacks]
    results: list[Any] = [None] * len(stacks)
    for members in _alike(stacks):
        found = _in_one_loop(function, [stacks[k] for k in members])
        for k, result in zip(members, found, strict=True):
            results[k] = result
    return results


def map_stack(
    function: Callable[..., Any], view: MatrixView, leaf: jax.Array, *others: Any
) -> Any:
    """Calls a function on the matrices of a leaf sequentially.

    Matrices of a batch axis that a mesh may have split stay side by side, as a loop
    along that axis would have every device gather the others' matrices.

    Args:
      function: from the view of one matrix, its slice of the leaf, and one entry of
        each of `others`.
      view: how the leaf is seen as matrices.
      leaf: array of the view's shape.
      *others: trees of arrays whose leading axes are the batch axes.

    Returns:
      What the function returns, with the batch axes in front.
    """
    if not view.batch_axes:
        return function(view, leaf, *others)
    axis = view.batch_axes[0]
    size, rest = view.shape[axis], view.without(axis)
    side_by_side = possible_pieces(size, leaf)
    loop = size // side_by_side

    def call(leaf, *others):
        return map_stack(function, rest, leaf, *others)

    def divided(x, axis):
        return x.reshape(*x.shape[:axis], side_by_side, loop, *x.shape[axis + 1 :])

    def step(k):
        def pick(x, axis):
            return jax.lax.dynamic_index_in_dim(x, k, axis, keepdims=False)

        if side_by_side == 1:
            return call(pick(leaf, axis), *jax.tree.map(lambda x: pick(x, 0), others))
        pieces = jax.tree.map(lambda x: pick(divided(x, 0), 1), others)
        return jax.vmap(call, (axis, *(0 for _ in others)))(
            pick(divided(leaf, axis), axis + 1), *pieces
        )

    results = jax.lax.map(step, jnp.arange(loop))
    if side_by_side == 1:
        return results
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:]), results)


def map_large(
    function: Callable[..., Any], view: MatrixView, leaf: jax.Array, *others: Any
) -> Any:
    """Calls a function on a leaf; on meshes, on large matrices sequentially.

    A product with a basis replicates its coordinates over a mesh for a moment,
    however many devices there are: of a stack of 32 layers of 7B, 1.3 GiB. In a loop
    they are those of one matrix at a time, or of as many as the mesh could have split
    the stack into.

    Args:
      function: of a view, its leaf and `others`: those given, or those of one matrix.
      view: how the leaf is seen as matrices.
      leaf: array of the view's shape.
      *others: trees of arrays whose leading axes are the batch axes.

    Returns:
      What the function returns, with the batch axes in front.
    """
    on_mesh = jax.typeof(leaf).sharding.mesh.size > 1
    if on_mesh and math.prod(view.coordinates_shape[-2:]) >= LARGE:
        return map_stack(function, view, leaf, *others)
    return function(view, leaf, *others)


def possible_pieces(size: int, leaf: jax.Array) -> int:
    """Maximum number of shards along an axis of a leaf.

    Automatic axes do not tell: any of them that divide the size may split it.
    """
    mesh = jax.typeof(leaf).sharding.mesh
    pieces = {1}
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto:
            pieces |= {count * mesh.shape[name] for count in pieces}
    return math.lcm(*(count for count in pieces if size % count == 0))


def result_shapes(function: Callable[..., Any], stacks: Sequence[Stack]) -> list[Any]:
    """Shapes and dtypes of the function's results for one matrix of each leaf."""
    results: list[Any] = [None] * len(stacks)
    for members in _alike(stacks):
        shapes = jax.eval_shape(function, *stacks[members[0]].shapes)
        for k in members:
            results[k] = shapes
    return results


def _alike(stacks: Sequence[Stack]) -> list[list[int]]:
    """Groups of leaves whose matrices have the same shapes and dtypes."""
    groups: dict[Any, list[int]] = {}
    for k, stack in enumerate(stacks):
        leaves, structure = jax.tree.flatten(stack.shapes)
        groups.setdefault((structure, *leaves), []).append(k)
    return list(groups.values())


def _in_one_loop(function: Callable[..., Any], stacks: Sequence[Stack]) -> list[Any]:
    """Results for leaves whose matrices have the same size."""
    counts = [math.prod(stack.view.batch_shape) for stack in stacks]
    stack_of = np.repeat(np.arange(len(stacks)), counts)
    index_of = np.concatenate([np.arange(count) for count in counts])
    picks = [functools.partial(_pick, *stack) for stack in stacks]

    def call(which):
        k, index = which
        return function(*switch(k, [functools.partial(pick, index) for pick in picks]))

    results = jax.lax.map(call, (stack_of, index_of))

    def shaped(stack, part):
        batch = stack.view.batch_shape
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), part)

    return list(map(shaped, stacks, unstack(results, counts)))


@functools.partial(jax.jit, static_argnums=0)
def _pick(view: MatrixView, leaf: jax.Array, others: Any, index: jax.Array) -> Any:
    """One matrix of a leaf by its flat index; traced once for leaves that are alike."""
    axes = len(view.batch_axes)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), others)
    return view.wide_at(leaf, index), *jax.tree.map(lambda x: x[index], flat)
