"""Names, shapes and dtypes of the leaves of a tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subtrack_jax._internal.boxes import content, is_box
from subtrack_jax._internal.trees import is_python_number


def path_name(path: tuple[Any, ...]) -> str:
    """Keys of a path joined by "/"; "(root)" for a tree that is one leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


class NamedLeaf(NamedTuple):
    """Name, shape and dtype of a leaf.

    Attributes:
      name: keys of its path, joined by "/"; metadata around an array does not show.
      shape: shape of the array, () for a Python number.
      dtype: dtype of the array; of a number, JAX's default.
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
    """Name, shape and dtype of a leaf, which may be boxed.

    Raises:
      TypeError: if it is neither an array of numbers nor a number.
    """
    leaf = content(node)
    if is_python_number(leaf):
        return NamedLeaf(path_name(path), (), jnp.result_type(leaf))
    # False for PRNG keys, float0, and objects that are not arrays.
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
