"""Rotary position embeddings, with LLaMA 3's scaling to longer sequences."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import RotaryScaling


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, (..., length, head_size / 2), float32."""

    cos: jax.Array
    sin: jax.Array


def rotary_frequencies(
    head_size: int, base: float = 10_000.0, scaling: RotaryScaling | None = None
) -> np.ndarray:
    """Rotary frequencies: radians per position for each pair of dimensions.

    Args:
      head_size: dimensions of a head, even.
      base: the frequency of pair i is `base^(-2 i / head_size)`.
      scaling: LLaMA 3's scaling; None: none.

    Returns:
      (head_size / 2,), float64.

    >>> from models import rotary
    >>> scaling = rotary.RotaryScaling(8.0, 100, 1.0, 4.0)
    >>> rotary.rotary_frequencies(6, 1000.0).round(4)
    array([1.  , 0.1 , 0.01])
    >>> rotary.rotary_frequencies(6, 1000.0, scaling).round(4)
    array([1.    , 0.0298, 0.0013])
    """
    frequencies = base ** -(np.arange(0, head_size, 2) / head_size)
    if scaling is None:
        return frequencies
    rotations = scaling.original_length_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_angles(
    positions: jax.Array,
    head_size: int,
    base: float = 10_000.0,
    scaling: RotaryScaling | None = None,
) -> Rotary:
    """Cosines and sines of the rotary angles of given positions.

    Args:
      positions: (length,) or (batch, length) integers.
      head_size: dimensions of a head, even.
      base: see `rotary_frequencies`.
      scaling: see `rotary_frequencies`.
    """
    frequencies = jnp.asarray(rotary_frequencies(head_size, base, scaling), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def apply_rotary(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotates queries or keys by the angles of their positions.

    Dimensions i and i + head_size / 2 form a pair, as in Hugging Face's LLaMA.

    Args:
      x: (batch, length, heads, head_size).
      rotary: from `rotary_angles` for the same positions.

    Returns:
      The same shape and dtype. The dot product of two rotated vectors depends on
      their relative position alone.
    """
    cos, sin = rotary.cos[..., None, :], rotary.sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
