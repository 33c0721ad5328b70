"""Branches that leave alone what they do not change."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def apply_if(
    predicate: jax.Array, function: Callable[[Tree], Tree], operand: Tree, name: str
) -> Tree:
    """`function(operand)` where a scalar is true, else the operand itself.

    A loop of at most one turn. A conditional would have to copy what its other
    branch passes through, bases and moments of every matrix on every step; a loop
    that makes no turn leaves its operand where it is.

    Args:
      predicate: scalar bool.
      function: from a tree to one of the same structure, shapes and dtypes.
      operand: the tree.
      name: of the loop, in profiles and compiled programs.

    Returns:
      A tree like `operand`.

    Example:
      >>> import jax.numpy as jnp
      >>> add_one = lambda x: x + 1
      >>> [int(apply_if(b, add_one, jnp.int32(5), "add")) for b in (False, True)]
      [5, 6]
    """
    with jax.named_scope(name):
        _, result = jax.lax.while_loop(
            lambda carry: carry[0],
            lambda carry: (jnp.zeros_like(carry[0]), function(carry[1])),
            (jnp.asarray(predicate, bool), operand),
        )
    return result
