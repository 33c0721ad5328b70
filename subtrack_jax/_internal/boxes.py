"""Metadata boxes: tree nodes with one array and metadata, as in Flax."""

from typing import Any

import jax


def is_box(node: Any) -> bool:
    """Whether a node of a tree is one array with metadata around it.

    As in Flax: `nnx.Variable` and `nn.Partitioned`, which name the parameter's axes.
    A basis and coordinates have axes of their own, so that their state is kept
    without the box. Told by their methods: Flax is not needed here.
    """
    kind = type(node)
    has_metadata = hasattr(kind, "get_metadata") or hasattr(kind, "replace_boxed")
    return has_metadata and len(jax.tree.leaves(node)) == 1


def content(node: Any) -> Any:
    """Returns the leaf without its box."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def unboxed(tree: Any) -> Any:
    """Replaces every box of a tree by its array."""
    return jax.tree.map(
        lambda node: content(node) if is_box(node) else node, tree, is_leaf=is_box
    )
