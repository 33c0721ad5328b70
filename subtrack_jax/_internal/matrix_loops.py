"""One compiled loop per matrix size over the matrices of many leaves."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from subtrack_jax._internal.loops import switch, unstack
from subtrack_jax._internal.matrix_view import MatrixView


class Stack(NamedTuple):
    """The matrices of one leaf, and what else belongs to each of them.

    Attributes:
      view: how the leaf is seen as matrices.
      leaf: of the view's shape.
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

    On one device all matrices of a size, of whatever leaf, go through the same loop:
    a model has a few sizes and hundreds of matrices, and a loop is compiled once. On
    a mesh every leaf has a loop of its own (`MatrixView.map`), as two leaves of a
    size may be split along different sides.

    Args:
      function: of a matrix (m, n) and one entry of each of the others of its stack.
      stacks: the leaves.

    Returns:
      What the function returns, for every leaf, batch axes first.
    """
    if any(jax.typeof(stack.leaf).sharding.mesh.size > 1 for stack in stacks):
        of_one = lambda view, leaf, *others: function(view.wide(leaf), *others)
        return [view.map(of_one, leaf, *others) for view, leaf, others in stacks]
    results: list[Any] = [None] * len(stacks)
    for members in _alike(stacks):
        found = _in_one_loop(function, [stacks[k] for k in members])
        for k, result in zip(members, found, strict=True):
            results[k] = result
    return results


def result_shapes(function: Callable[..., Any], stacks: Sequence[Stack]) -> list[Any]:
    """What the function returns for one matrix of each leaf, as shapes and dtypes."""
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
    """The results for leaves whose matrices have one size."""
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
