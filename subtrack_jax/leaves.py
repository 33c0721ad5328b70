"""Leaves of parameter trees: boxed in metadata or not, by name, and their dtypes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtrack_jax.matrix_view import MatrixView


def is_box(node: Any) -> bool:
    """Whether a node of a tree is one array with metadata around it.

    As in Flax: `nnx.Variable` and `nn.Partitioned`, which name the parameter's axes.
    A basis and coordinates have axes of their own, so that their state is kept
    without the box. Told by their methods: Flax is not needed here.
    """
    kind = type(node)
    has_metadata = hasattr(kind, "get_metadata") or hasattr(kind, "replace_boxed")
    return has_metadata and len(jax.tree.leaves(node)) == 1


def is_masked(node: Any) -> bool:
    """Whether a node of a tree stands for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


def content(node: Any) -> Any:
    """The leaf, without its box if it has one."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def map_leaves(
    low_rank: Callable[[Any, MatrixView], Any],
    plain: Callable[[Any], Any],
    params: optax.Params,
    views: Any,
) -> Any:
    """Maps one function over the low-rank leaves of a tree, another over the rest.

    Args:
      low_rank: from an array, without its box, and its view.
      plain: from a leaf, in its box.
      params: the tree.
      views: of `LowRank.views`.

    Returns:
      The tree of results, which take the place of boxes as well.
    """

    def function(leaf, view):
        return plain(leaf) if view is None else low_rank(content(leaf), view)

    return jax.tree.map(function, params, views, is_leaf=is_box)


def path_name(path: tuple[Any, ...]) -> str:
    """Keys of a path joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype of bases and moments: the parameter's, float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def named_leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Paths and arrays; metadata around an array does not show in its path."""
    return [
        (path, content(leaf))
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_box)
    ]
