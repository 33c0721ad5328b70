"""Dimension numbers: matrix axes of each leaf, in optax's form.

`resolve` turns the forms that `LowRank.dimension_numbers` takes into one entry for
each leaf; `by_path` builds one of these forms from a regular expression.
"""

import dataclasses
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from subtrack_jax._internal.boxes import is_box
from subtrack_jax._internal.named_leaves import NamedLeaf, named_leaf
from subtrack_jax._internal.trees import is_masked

SPECS = (optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers)


def by_path(
    pattern: str, reduction_axis: Any = -2, output_axis: Any = -1
) -> Callable[[optax.Params], Any]:
    """Dimension numbers for the leaves whose path matches a regular expression.

    Args:
      pattern: searched (`re.search`) in the leaf's path, its keys joined by "/".
      reduction_axis: axis or axes of the matrix' rows, inputs in a Flax kernel.
      output_axis: axis or axes of its columns.

    Returns:
      A function from parameters to dimension numbers, for `LowRank`. Leaves of
      fewer than two axes, of integers or of booleans never match.

    Raises:
      ValueError: if the pattern is not a regular expression.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
      >>> by_path("mlp/")(params)["mlp"]["kernel"]
      MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} does not compile: {error}.") from error
    return _ByPath(
        pattern,
        optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis),
    )


@dataclasses.dataclass(frozen=True)
class _ByPath:
    """Callable class instead of a closure, so that error messages show the pattern."""

    pattern: str
    spec: optax.contrib.MuonDimensionNumbers

    def __call__(self, params: optax.Params) -> Any:
        def spec(path, node):
            leaf = named_leaf(path, node)
            found = leaf.may_be_matrix and re.search(self.pattern, leaf.name)
            return self.spec if found else None

        return jax.tree.map_with_path(spec, params, is_leaf=is_box)

    def __repr__(self) -> str:
        return f"by_path({self.pattern!r})"


def resolve(wanted: Any, tree: Any, leaves: Sequence[NamedLeaf]) -> list[Any]:
    """Resolves the dimension numbers of every leaf.

    Args:
      wanted: as `LowRank.dimension_numbers`.
      tree: parameters, gradients or shapes.
      leaves: leaves of the tree, in order.

    Returns:
      A spec or None for each leaf.

    Raises:
      ValueError: if `wanted` has another structure than the tree.
    """
    if wanted is None:
        spec = optax.contrib.MuonDimensionNumbers()
        return [
            spec if leaf.may_be_matrix and len(leaf.shape) == 2 else None
            for leaf in leaves
        ]
    # Instances of a model class may be callable without being functions of params.
    if callable(wanted) and not _is_tree_of_specs(wanted):
        wanted = wanted(tree)
    if isinstance(wanted, SPECS):
        axes = axes_of(wanted.reduction_axis) + axes_of(wanted.output_axis)
        reach = max((axis + 1 if axis >= 0 else -axis for axis in axes), default=0)
        return [
            wanted if leaf.may_be_matrix and len(leaf.shape) >= reach else None
            for leaf in leaves
        ]
    return _leaf_by_leaf(wanted, tree)


def axes_of(axes: Any) -> tuple[int, ...]:
    """Converts one axis or several to a tuple."""
    return (int(axes),) if isinstance(axes, numbers.Integral) else tuple(axes)


def suggestion(leaves: Sequence[NamedLeaf]) -> str:
    """Formats the argument that selects some leaves, for messages."""
    pattern = "|".join(re.escape(leaf.name) for leaf in leaves)
    return f"dimension_numbers=subtrack_jax.by_path({f'^({pattern})$'!r})"


def _leaf_by_leaf(wanted: Any, tree: Any) -> list[Any]:
    """Flattens a tree of specs, or a prefix of one, to a list."""
    # None is both "leave alone" and, as in every Equinox model, a place without a
    # parameter; there and where a wrapper has masked leaves, specs have no meaning.
    nodes = jax.tree.leaves_with_path(tree, is_leaf=_is_hole)
    holes = {path for path, node in nodes if _is_hole(node)}
    try:
        pruned = jax.tree.map_with_path(
            lambda path, spec: None if path in holes else spec,
            wanted,
            is_leaf=lambda path, node: path in holes or _is_spec(node),
            is_leaf_takes_path=True,
        )
        specs = jax.tree.broadcast(pruned, tree, is_leaf=_is_spec)
    except ValueError as error:
        raise ValueError(
            f"dimension_numbers do not have the structure of the parameters: {error}"
        ) from error
    structure: Any = jax.tree.structure(tree)
    return structure.flatten_up_to(specs)


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, SPECS)


def _is_hole(node: Any) -> bool:
    return node is None or is_masked(node)


def _is_tree_of_specs(wanted: Any) -> bool:
    leaves = jax.tree.leaves(wanted, is_leaf=_is_spec)
    return bool(leaves) and all(map(_is_spec, leaves))
