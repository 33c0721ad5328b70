"""Transport of a rule's state to the coordinates of a moved basis.

A transport is a function of the rule's state and of a tree with a `Rotation` for
each low-rank leaf; other leaves are masked out of both (`optax.MaskedNode`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import sharding
from subtrack_jax._internal.leaves import is_masked, state_dtype
from subtrack_jax._internal.record import Pair, unzip
from subtrack_jax.stages.rotation import Rotation

_MOMENTUM_FIELDS = ("mu", "trace", "ema")


def transport_adam(
    state: optax.ScaleByAdamState,
    rotations: Any,
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
) -> optax.ScaleByAdamState:
    """Writes Adam's moments in new coordinates.

    The first moment is a vector and turns with C. The second is a variance plus
    a squared mean, of which C∘C mixes the former (LDAdam, arXiv 2410.16103, for
    coordinates taken as uncorrelated; SubTrack++, equations 8 and 9):
    M <- C M, V <- (1 - b2^t) |C∘C (v^ - m^∘m^) + (C m^)∘(C m^)|, with the
    bias-corrected m^ and v^ after t steps.

    Args:
      state: the moments after `count` steps.
      rotations: tree with a `Rotation` C for each moment.
      b1: decay of the first moment.
      b2: decay of the second moment.

    Returns:
      The same state in the new coordinates.
    """

    def weight(decay, dtype):
        weight = 1 - jnp.asarray(sharding.local(decay), dtype) ** state.count
        return jnp.where(weight > 0, weight, 1)  # moments are 0 before step 1

    @jax.jit  # traced once for leaves that are alike
    def rotate(rotation, mu, nu):
        mean = mu.astype(nu.dtype)
        rotated = rotation.rotate(mean)
        # All of the second line multiplied by nu's weight, which |.| lets through.
        ratio = weight(b2, nu.dtype) / weight(b1, nu.dtype) ** 2
        variance = rotation.rotate_squared(nu - ratio * mean * mean)
        return Pair(
            rotated.astype(mu.dtype), jnp.abs(variance + ratio * rotated * rotated)
        )

    pairs = jax.tree.map(rotate, rotations, state.mu, state.nu, is_leaf=_is_rotation)
    mu, nu = unzip(pairs)
    return state._replace(mu=mu, nu=nu)


def transport_momentum(state: optax.OptState, rotations: Any) -> optax.OptState:
    """Writes the momentum of any optax rule in new coordinates.

    What is linear in past gradients or directions turns with C: M <- C M, for every
    `mu` (Adam, Lion, Muon), `trace` (SGD) and `ema` (`optax.ema`) of the state,
    however the rule is nested. All else is kept: counts, and second moments, which
    belong to the old coordinates until the rule forgets them.

    Args:
      state: the rule's state.
      rotations: tree with a `Rotation` C for each momentum.

    Returns:
      The same state in the new coordinates.

    Raises:
      TypeError: the state has no such field.
    """

    def momentum(node):
        # By fields: arrays have a method `trace`, parameters may be named `mu`.
        return [x for x in _MOMENTUM_FIELDS if x in getattr(node, "_fields", ())]

    has_momentum = lambda node: bool(momentum(node))
    if not any(map(has_momentum, jax.tree.leaves(state, is_leaf=has_momentum))):
        raise TypeError(
            f"transport_momentum found no mu, trace or ema in a {type(state).__name__}:"
            " use a rule with momentum, or transport=None."
        )

    def rotate(rotation, mu):
        if is_masked(mu):  # this leaf has another rule
            return mu
        return rotation.rotate(mu.astype(state_dtype(mu.dtype))).astype(mu.dtype)

    def turn(node):
        turned = {
            field: jax.tree.map(
                rotate, rotations, getattr(node, field), is_leaf=_is_rotation
            )
            for field in momentum(node)
        }
        return node._replace(**turned) if turned else node

    return jax.tree.map(turn, state, is_leaf=has_momentum)


def _is_rotation(node: Any) -> bool:
    return isinstance(node, Rotation)
