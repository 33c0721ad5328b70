"""Leaves of parameter trees: boxed in metadata or not, by name, and their dtypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subtrack_jax._internal.matrix_view import MatrixView


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
    """Keys of a path joined by "/"; "(root)" for a tree that is one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def state_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype of bases and moments: the parameter's, float32 at least."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 4
    return dtype if is_wide else jnp.dtype(jnp.float32)


class NamedLeaf(NamedTuple):
    """Name, shape and dtype of a leaf.

    Attributes:
      name: keys of its path, joined by "/"; metadata around an array does not show.
      shape: of the array, () for a Python number.
      dtype: likewise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any

    @property
    def may_be_matrix(self) -> bool:
        """Whether it has two axes or more, of numbers that have a gradient."""
        return len(self.shape) >= 2 and jnp.issubdtype(self.dtype, jnp.inexact)

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


def named_leaf(path: tuple[Any, ...], node: Any) -> NamedLeaf:
    """Describes a leaf, in its box if it has one.

    Raises:
      TypeError: if it is neither an array of numbers nor a number.
    """
    leaf = content(node)
    if _is_python_number(leaf):
        return NamedLeaf(path_name(path), (), jnp.result_type(leaf))
    # Not so of PRNG keys, of float0, and of what is not an array at all.
    dtype = getattr(leaf, "dtype", np.object_)
    if not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        is_array = hasattr(leaf, "dtype")
        what = f"an array of {dtype}" if is_array else f"a {type(leaf).__name__}"
        raise TypeError(
            f"{path_name(path)} is {what}, which an optimizer cannot change: give it"
            " numbers only, such as eqx.filter(model, eqx.is_inexact_array) of an"
            " Equinox model or nnx.state(model, nnx.Param) of a Flax one."
        )
    return NamedLeaf(path_name(path), leaf.shape, dtype)


def named_leaves(tree: Any) -> list[NamedLeaf]:
    """Describes all leaves of a tree, in order; see `named_leaf`."""
    return [
        named_leaf(path, node)
        for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_box)
    ]


def expect_gradients(updates: Any, state: Any) -> None:
    """Raises if a leaf has no gradient that had a parameter when `init` was called.

    Args:
      updates: the gradients, `None` where there is none.
      state: of the same structure, with something for each parameter.

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


def as_arrays(tree: Any) -> Any:
    """A tree whose Python numbers have become arrays."""
    if not any(map(_is_python_number, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda x: jnp.asarray(x) if _is_python_number(x) else x, tree)


def _is_python_number(leaf: Any) -> bool:
    return isinstance(leaf, (bool, int, float, complex))


def is_traceable(tree: Any) -> bool:
    """Whether a tree holds numbers and arrays only, and no functions or text."""
    kinds = jax.Array, np.ndarray, np.generic, bool, int, float, complex
    return all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(tree))


def is_hashable(value: Any) -> bool:
    """Whether a value, with all that it holds, can be a static argument."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
