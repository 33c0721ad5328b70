"""Transport of a rule's state to the coordinates of a new basis.

When a basis moves from S_{t-1} to S_t, coordinates change by the r x r matrix
C = S_t^T S_{t-1}, a `Rotation`. Adam's moments take two products: C with the first
moment, and its elementwise square C∘C with the second.

A transport is a function of the rule's state and of a tree with a `Rotation` for
each low-rank leaf; other leaves are masked out of both (`optax.MaskedNode`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.products import dot
from subtrack_jax._internal.trees import Pair, is_masked, state_dtype, unzip

Transport = Callable[[optax.OptState, Any], optax.OptState]

_MOMENTUM_FIELDS = ("mu", "trace", "ema")


@runtime_checkable
class Rotation(Protocol):
    """Interface of a change of basis; x has shape (..., r, n)."""

    def rotate(self, x: jax.Array) -> jax.Array:
        """C x."""
        ...

    def rotate_squared(self, x: jax.Array) -> jax.Array:
        """(C∘C) x, with the elementwise square of C."""
        ...


class RankOneRotation(NamedTuple):
    """The change of basis of a rank-one geodesic, without its r x r matrix.

    C = I + (cos theta - 1) v v^T for the geodesic of `grassmann.geodesic`, so
    that both products cost O(r n). All zeros is the identity.

    Attributes:
      direction: v, a unit vector or zero, of shape (..., r).
      cosine: cos theta, of shape (...).
    """

    direction: jax.Array
    cosine: jax.Array

    def rotate(self, x: jax.Array) -> jax.Array:
        """C x."""
        return x + self._along(self.direction, self._bend, x)

    def rotate_squared(self, x: jax.Array) -> jax.Array:
        """(C∘C) x."""
        # (C∘C)_ij = delta_ij (1 + 2 (c-1) v_i^2) + (c-1)^2 v_i^2 v_j^2
        weights, bend = self.direction**2, self._bend
        diagonal = 1 + 2 * bend[..., None] * weights
        return diagonal[..., None] * x + self._along(weights, bend**2, x)

    @classmethod
    def identity(cls, basis: jax.Array) -> Self:
        """Rotation of an unchanged basis: the identity."""
        *batch, _, rank = basis.shape
        return cls(
            jnp.zeros((*batch, rank), basis.dtype), jnp.zeros(batch, basis.dtype)
        )

    @property
    def _bend(self) -> jax.Array:
        return self.cosine - 1

    @staticmethod
    def _along(vector: jax.Array, factor: jax.Array, x: jax.Array) -> jax.Array:
        """Returns factor * vector vector^T x."""
        row = jnp.sum(vector[..., None] * x, axis=-2, keepdims=True)
        return (factor[..., None] * vector)[..., None] * row


class DenseRotation(NamedTuple):
    """Any change of basis, from the two bases.

    Attributes:
      basis: S_t, of shape (..., m, r).
      previous_basis: S_{t-1}, of the same shape.
    """

    basis: jax.Array
    previous_basis: jax.Array

    def rotate(self, x: jax.Array) -> jax.Array:
        """C x."""
        return dot(self._matrix, x)

    def rotate_squared(self, x: jax.Array) -> jax.Array:
        """(C∘C) x."""
        return dot(self._matrix**2, x)

    @property
    def _matrix(self) -> jax.Array:
        return dot(self.basis.mT, self.previous_basis)


def transport_adam(
    state: optax.ScaleByAdamState,
    rotations: Any,
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
) -> optax.ScaleByAdamState:
    """Transports Adam's moments to new coordinates.

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
        weight = 1 - jnp.asarray(decay, dtype) ** state.count
        return jnp.where(weight > 0, weight, 1)  # moments are 0 before step 1

    @jax.jit  # traced once for leaves that are alike
    def rotate(rotation, mu, nu):
        mean = mu.astype(nu.dtype)
        rotated = rotation.rotate(mean)
        # The second line is multiplied by nu's (positive) weight inside of |.|.
        ratio = weight(b2, nu.dtype) / weight(b1, nu.dtype) ** 2
        variance = rotation.rotate_squared(nu - ratio * mean * mean)
        return Pair(
            rotated.astype(mu.dtype), jnp.abs(variance + ratio * rotated * rotated)
        )

    pairs = jax.tree.map(rotate, rotations, state.mu, state.nu, is_leaf=_is_rotation)
    mu, nu = unzip(pairs)
    return state._replace(mu=mu, nu=nu)


def transport_momentum(state: optax.OptState, rotations: Any) -> optax.OptState:
    """Transports the momentum of any optax rule to new coordinates.

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
        # By field names: arrays have a method `trace`, parameters may be named `mu`.
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
