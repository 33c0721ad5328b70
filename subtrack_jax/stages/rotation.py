"""Changes of basis, applied to moments in coordinates.

When a basis moves from S_{t-1} to S_t, coordinates change by the r x r matrix
C = S_t^T S_{t-1}. Transporting Adam's moments takes two products: C with the
first moment, and the elementwise square C∘C with the second.
"""

from typing import NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from subtrack_jax._internal.products import dot


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
        """The rotation of a basis that keeps still."""
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
