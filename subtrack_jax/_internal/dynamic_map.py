"""Dynamic map: block-wise quantisation to eight bits.

Dettmers et al. 2022, arXiv 2110.02861: each block of numbers is divided by its
largest and coded by a map that spends its bits on large numbers and still reaches
down to a millionth. Ours: how numbers between two codes are rounded (`encode`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

SMALLEST_ROW = 32
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 256
_COARSE = 3  # decades with few codes


def encode(
    x: jax.Array,
    dtype: jax.typing.DTypeLike,
    count: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantises numbers by the dynamic map, in blocks along the last axis.

    A code c in 1, 2, ... of b bits (7 of int8, whose sign is the number's, and 8 of
    uint8) with 2^e as its leading bit is 10^(e + 1 - b) (0.1 + 0.9 f), f its other
    bits' fraction of 2^e at the middle of its step.

    Averages that change by less than half a step would never change if they were
    rounded to the nearest code. With a count they are dithered: roundings up and
    down even out over steps. In the three lowest decades, whose steps are as wide as
    their numbers, int8 is rounded towards zero and uint8 away from it: a small
    moment, divided by a small root, can only become smaller.

    Args:
      x: array of at least one axis; not negative for uint8.
      dtype: int8 or uint8.
      count: number of the step, for stochastic rounding; None rounds to nearest.
      rows: places of the rows of a slice in its matrix, by which they are dithered.

    Returns:
      Codes of the shape of x, and the scale of each block, in x's dtype. A block's
      largest number is kept, up to rounding, and of uint8 zero alone is zero.
    """
    is_signed = jnp.iinfo(dtype).min < 0
    bits = jnp.iinfo(dtype).bits - is_signed
    largest = _magnitude(jnp.array(2**bits - 1), bits, x.dtype)
    blocks = _blocks(x)
    magnitude = jnp.abs(blocks)
    scale = jnp.max(magnitude, axis=-1) / largest
    fraction = magnitude / jnp.where(scale > 0, scale, 1)[..., None]
    is_below = [fraction < 0.1**decade for decade in range(1, bits)]
    steps = _product(is_below, 0.5, fraction) * 2 ** (bits - 1)
    # The number of code c is at position c + 1/2.
    position = steps * (1 + (fraction * _product(is_below, 10, fraction) - 0.1) / 0.9)
    shift = 0 if count is None else _dither(count, position, rows)
    shift = jnp.where(is_below[-_COARSE], -0.49 if is_signed else 0.49, shift)
    code = jnp.clip(position + shift, 0, 2**bits - 1)
    code = jnp.sign(blocks).astype(jnp.int32) * code.astype(jnp.int32)
    return _unblocked(code.astype(dtype), x.shape[-1]), scale


def decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """Dequantises numbers of `encode`, in the dtype of the scales."""
    bits = jnp.iinfo(codes.dtype).bits - (jnp.iinfo(codes.dtype).min < 0)
    code = _blocks(codes).astype(jnp.int32)
    magnitude = _magnitude(jnp.abs(code), bits, scale.dtype)
    value = jnp.sign(code).astype(scale.dtype) * magnitude * scale[..., None]
    return _unblocked(value, codes.shape[-1])


def _magnitude(code: jax.Array, bits: int, dtype: Any) -> jax.Array:
    """The dynamic map of codes from 1 on; at 0 any finite number."""
    code = code.astype(dtype)
    is_below = [code < 2**leading for leading in range(bits - 1, 0, -1)]
    rest = (code + 0.5) * _product(is_below, 2, code) * 0.5 ** (bits - 1) - 1
    return _product(is_below, 0.1, code) * (0.1 + 0.9 * rest)


def _product(conditions: list[jax.Array], factor: float, like: jax.Array) -> jax.Array:
    """Product of the factor over all conditions that hold."""
    result = jnp.ones_like(like)
    for condition in conditions:
        result = jnp.where(condition, result * factor, result)
    return result


def _dither(count: jax.Array, blocks: jax.Array, rows: jax.Array | None) -> jax.Array:
    """Dither of each number: shifts in [-1/2, 1/2) with mean 0 over steps.

    Multiples of irrational numbers modulo 1, in fixed point, of which the next fills
    the largest gap (Kronecker's sequence). They are the same for all matrices of a
    stack, on any mesh.
    """
    place = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, blocks.shape, axis)
    dither = count.astype(jnp.uint32) * jnp.uint32(2654435769)
    column = place(blocks.ndim - 2) * blocks.shape[-1] + place(blocks.ndim - 1)
    dither += column * jnp.uint32(3242174889)
    if blocks.ndim > 2:
        row = place(blocks.ndim - 3)
        if rows is not None:
            row = rows.astype(jnp.uint32)[:, None, None]
        dither += row * jnp.uint32(2447445413)
    return (dither >> 8).astype(blocks.dtype) * 2.0**-24 - 0.5


def block_size(row: int) -> int:
    """Block size: number of elements along the last axis that share a scale.

    A divisor of the axis, so that a device that holds a part of it holds whole
    blocks: of the divisors in range the one of which a large power of two, up to 64,
    makes the axis. A last block is shorter where there is none.
    """
    if row < _SMALLEST_BLOCK:
        return row
    sizes = range(_SMALLEST_BLOCK, min(row, _LARGEST_BLOCK) + 1)
    divisors = [size for size in sizes if row % size == 0]
    return max(
        divisors, key=lambda size: (math.gcd(row // size, 64), size), default=sizes[-1]
    )


def _blocks(x: jax.Array) -> jax.Array:
    """(..., row) as (..., blocks, block)."""
    size = block_size(x.shape[-1])
    missing = -x.shape[-1] % size
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _unblocked(blocks: jax.Array, row: int) -> jax.Array:
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :row]
