"""Functions of small square matrices, in loops of products without decompositions.

Loops, as the TPU compiler takes seconds over each product at full precision.
"""

import jax
import jax.numpy as jnp

from subtrack_jax._internal.loops import fori_loop, while_loop
from subtrack_jax._internal.products import dot

# Doublings of an angle: enough for the largest number of float32.
_MOST_DOUBLINGS = 64


def cosine_and_sinc(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos(sqrt H) and sinc(sqrt H), by Taylor series after halving the angles.

    Args:
      gram: H, symmetric positive semi-definite, of shape (r, r).

    Returns:
      Two matrices of the same shape.
    """
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    # The trace bounds the largest eigenvalue: halve until every angle is <= 1.
    bound = jax.lax.stop_gradient(jnp.maximum(jnp.trace(gram), 1.0))
    halvings = jnp.ceil(jnp.log2(bound) / 2)
    small = gram / 4.0**halvings

    def horner(i, values):
        cosine, sinc = values
        k = jnp.asarray(9 - i, gram.dtype)
        cosine = identity - dot(small, cosine) / ((2 * k - 1) * (2 * k))
        sinc = identity - dot(small, sinc) / ((2 * k) * (2 * k + 1))
        return cosine, sinc

    def double(carry):
        left, cosine, sinc = carry
        return left - 1, 2 * dot(cosine, cosine) - identity, dot(sinc, cosine)

    # The last terms come first; 1 / 20! is below float64 rounding.
    last = identity - small / (19 * 20), identity - small / (20 * 21)
    values = fori_loop(9, horner, last)
    left = halvings.astype(jnp.int32)
    _, cosine, sinc = while_loop(
        lambda carry: carry[0] > 0, double, (left, *values), _MOST_DOUBLINGS
    )
    return cosine, sinc


def polar_factor(matrix: jax.Array) -> jax.Array:
    """Orthogonal factor of the polar decomposition, by Newton-Schulz iteration.

    Args:
      matrix: (r, r), with singular values of at most 1.

    Returns:
      A matrix of shape (r, r) whose singular values are 1 where they were not tiny.
    """
    # Each step multiplies small singular values by 3/2, and brings all nearer to 1.
    return fori_loop(32, lambda _, x: 1.5 * x - 0.5 * dot(x, dot(x.T, x)), matrix)
