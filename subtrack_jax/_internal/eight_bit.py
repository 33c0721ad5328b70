"""Adam's moments in eight bits.

Dettmers et al. 2022, arXiv 2110.02861, with the codes of `dynamic_map`. Ours: the
second moment is coded as its root, which is what the update divides by.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import Partial

from subtrack_jax._internal import placement
from subtrack_jax._internal.boxes import unboxed
from subtrack_jax._internal.dynamic_map import SMALLEST_ROW, block_size, decode, encode
from subtrack_jax._internal.trees import is_masked

_SMALLEST_LEAF = 4096


class EightBitAdamState(NamedTuple):
    """Adam's moments as codes with a scale for each block.

    Attributes:
      count: updates taken so far.
      mu: codes of the first moment, int8 in the moment's shape; the moment itself
        where a leaf is too small to be coded.
      nu: codes of the root of the second moment, uint8, likewise.
      mu_scale: scales of blocks along the last axis; `optax.MaskedNode` where nothing
        is coded.
      nu_scale: scales of `nu`, likewise.
    """

    count: jax.Array  # type: ignore[assignment]  # also a method of tuples
    mu: optax.Updates
    nu: optax.Updates
    mu_scale: optax.Updates
    nu_scale: optax.Updates


def in_eight_bits(
    adam: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Stores the Adam moments of a rule in eight bits between steps.

    Leaves of at least 4096 numbers are coded, if their last axis has 32 at least.
    The rule computes with what the codes stand for, in the dtype of the scales; its
    direction is that of moments not yet coded.

    Args:
      adam: with a state of type `optax.ScaleByAdamState`.

    Returns:
      The same rule with an `EightBitAdamState`. Its `update` takes
      `slice_rows`: the places of a leaf's rows in the matrix that it is a slice of.
    """

    def init_fn(params):
        def codes(dtype):
            return jax.tree.map(
                lambda x: jnp.zeros_like(x, dtype=dtype if _is_coded(x) else None),
                params,
            )

        def scales():
            # Scales have no boxes: metadata cannot name the axis of blocks.
            return jax.tree.map(_scales_like, unboxed(params))

        return EightBitAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=codes(jnp.int8),
            nu=codes(jnp.uint8),
            mu_scale=scales(),
            nu_scale=scales(),
        )

    update_fn = Partial(_update_coded, adam)
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _update_coded(adam, updates, state, params=None, slice_rows=None, **extra_args):
    del extra_args
    updates, moments = adam.update(updates, decode_moments(state), params)
    return updates, encode_moments(moments, state, slice_rows)


def transported(transport: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a transport of Adam's moments to work on codes."""
    return Partial(_transport_coded, transport)


def _transport_coded(transport, state, rotations):
    return encode_moments(transport(decode_moments(state), rotations), state)


def decode_moments(state: EightBitAdamState) -> optax.ScaleByAdamState:
    """Decodes the moments of a state."""

    def moments(decoded: Callable[[jax.Array], jax.Array], codes, scales):
        # Codes may be boxed, scales are not, so they are matched by order.
        structure: Any
        codes, structure = jax.tree.flatten(codes, is_leaf=is_masked)
        scales = jax.tree.leaves(scales, is_leaf=is_masked)
        return structure.unflatten(
            leaf if is_masked(scale) else decoded(decode(leaf, scale))
            for leaf, scale in zip(codes, scales, strict=True)
        )

    return optax.ScaleByAdamState(
        state.count,
        moments(lambda mu: mu, state.mu, state.mu_scale),
        moments(jnp.square, state.nu, state.nu_scale),
    )


def encode_moments(
    moments: optax.ScaleByAdamState,
    before: EightBitAdamState,
    rows: jax.Array | None = None,
) -> EightBitAdamState:
    """Encodes moments, dithered; see `encode`.

    Args:
      moments: the moments.
      before: the state before them, which decides on the leaves to encode. Their size
        cannot: one layer of a stack of norms is smaller than the stack.
      rows: of slices; see `encode`.

    Returns:
      The state with the new codes.
    """
    count = moments.count

    def coded(function: Callable[[jax.Array], jax.Array], dtype, moments, scales):
        def code(leaf, scale):
            if is_masked(leaf) or is_masked(scale):
                return leaf, optax.MaskedNode()
            return encode(function(leaf), dtype, count, rows)

        boxed: Any = jax.tree.structure(moments, is_leaf=is_masked)
        bare: Any = jax.tree.structure(unboxed(moments), is_leaf=is_masked)
        leaves = jax.tree.leaves(moments, is_leaf=is_masked)
        scales = jax.tree.leaves(scales, is_leaf=is_masked)
        pairs = [code(*each) for each in zip(leaves, scales, strict=True)]
        codes, scales = zip(*pairs, strict=True) if pairs else ((), ())
        return boxed.unflatten(codes), bare.unflatten(scales)

    mu, mu_scale = coded(lambda mu: mu, jnp.int8, moments.mu, before.mu_scale)
    nu, nu_scale = coded(jnp.sqrt, jnp.uint8, moments.nu, before.nu_scale)
    return EightBitAdamState(count, mu, nu, mu_scale, nu_scale)


def with_scales_of(shapes: Any, state: Any) -> Any:
    """Adds the scales to a new state that a given state has in addition.

    For checks of a state by the shapes of a new one: one layer of a stack may be too
    small to be coded, and is if the stack was.

    Args:
      shapes: shapes of a new state, of any rule.
      state: the given state.

    Returns:
      The shapes, changed where both are an `EightBitAdamState`.
    """
    if not all(isinstance(each, EightBitAdamState) for each in (shapes, state)):
        return shapes

    def scales(codes, new, given):
        structure: Any
        new, structure = jax.tree.flatten(new, is_leaf=is_masked)
        given = jax.tree.leaves(given, is_leaf=is_masked)
        if len(given) != len(new):
            return structure.unflatten(new)
        codes = jax.tree.leaves(codes, is_leaf=is_masked)
        return structure.unflatten(
            jax.ShapeDtypeStruct(_scales_shape(leaf), leaf.dtype)
            if is_masked(own) and not is_masked(leaf) and not is_masked(other)
            else own
            for leaf, own, other in zip(codes, new, given, strict=True)
        )

    return shapes._replace(
        mu_scale=scales(shapes.mu, shapes.mu_scale, state.mu_scale),
        nu_scale=scales(shapes.nu, shapes.nu_scale, state.nu_scale),
    )


def _is_coded(x: Any) -> bool:
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    return is_real and x.size >= _SMALLEST_LEAF and x.shape[-1] >= SMALLEST_ROW


def _scales_like(leaf: Any) -> Any:
    """Zero scales of a leaf's blocks, sharded like the leaf."""
    if not _is_coded(leaf):
        return optax.MaskedNode()
    zeros = jnp.zeros(_scales_shape(leaf), leaf.dtype)
    blocks = zeros.shape[-1]

    def spec_of(spec, mesh):
        names = (spec[-1],) if isinstance(spec[-1], str) else tuple(spec[-1] or ())
        while blocks % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return PartitionSpec(*spec[:-1], names)

    return placement.place(zeros, leaf, spec_of)


def _scales_shape(leaf: Any) -> tuple[int, ...]:
    row = leaf.shape[-1]
    return (*leaf.shape[:-1], -(-row // block_size(row)))
