"""Maps over trees of parameters, and the kinds of their leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subtrack_jax._internal.boxes import content, is_box
from subtrack_jax._internal.matrix_view import MatrixView


def map_leaves(
    low_rank: Callable[[Any, MatrixView], Any],
    plain: Callable[[Any], Any],
    params: optax.Params,
    views: Any,
) -> Any:
    """Maps one function over low-rank leaves of a tree, another over other leaves.

    Args:
      low_rank: from an array, without its box, and its view.
      plain: from a leaf, in its box.
      params: the tree.
      views: result of `LowRank.views`.

    Returns:
      The tree of results, which take the place of boxes as well.
    """

    def function(leaf, view):
        return plain(leaf) if view is None else low_rank(content(leaf), view)

    return jax.tree.map(function, params, views, is_leaf=is_box)


class Pair(NamedTuple):
    """Two results of one leaf, separated by `unzip`."""

    first: Any
    second: Any


def unzip(pairs: Any) -> tuple[Any, Any]:
    """Turns a tree of `Pair`s into two trees."""
    is_pair = lambda leaf: isinstance(leaf, Pair)
    return (
        jax.tree.map(lambda pair: pair.first, pairs, is_leaf=is_pair),
        jax.tree.map(lambda pair: pair.second, pairs, is_leaf=is_pair),
    )


def field_of(opt_state: optax.OptState, name: str) -> Any:
    """The unique field of this name in a state; parameter names are ignored."""
    found = optax.tree_utils.tree_get_all_with_path(
        opt_state,
        name,
        lambda path, _: isinstance(path[-1], optax.tree_utils.NamedTupleKey),
    )
    if len(found) != 1:
        raise ValueError(
            f"opt_state has {len(found)} fields {name!r}: give the state of one"
            f" low-rank optimizer that keeps its {name}."
        )
    return found[0][1]


def is_masked(node: Any) -> bool:
    """Whether a node of a tree stands for an absent leaf."""
    return isinstance(node, optax.MaskedNode)


def state_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype of bases and moments: the parameter's, but at least float32."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if is_wide else jnp.dtype(jnp.float32)


def as_arrays(tree: Any) -> Any:
    """Converts the Python numbers of a tree to arrays."""
    if not any(map(is_python_number, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda x: jnp.asarray(x) if is_python_number(x) else x, tree)


def is_python_number(leaf: Any) -> bool:
    """Whether a leaf is a Python number."""
    return isinstance(leaf, (bool, int, float, complex))


def is_traceable(tree: Any) -> bool:
    """Whether a tree holds numbers and arrays only, and no functions or text."""
    kinds = jax.Array, np.ndarray, np.generic, bool, int, float, complex
    return all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(tree))


def is_hashable(value: Any) -> bool:
    """Whether a value is hashable, so that it can be a static argument."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
