"""Geometry of the Grassmann manifold, without an SVD of anything large.

A point of Gr(r, m) is a subspace, held as an orthonormal `basis` S of shape
(m, r). Every function here is pure, works on one matrix (use `jax.vmap` for
more), and keeps the dtype it is given, which should be float32 or float64.
Products that form a basis or keep it orthonormal run at the highest precision:
bfloat16 passes, the default on TPUs, would lose the orthonormality that
everything else relies on. Products that only choose a direction run at the
default precision, at which the TPU compiler is ten times faster; their rounding
averages out over the long side, and the line search judges the result. Functions
with loops are jitted: un-jitted loops would be compiled anew on every call.

Sources: Edelman, Arias & Smith 1998, "The geometry of algorithms with
orthogonality constraints"; Bendokat, Zimmermann & Absil 2024, "A Grassmann
manifold handbook"; Halko, Martinsson & Tropp 2011, "Finding structure with
randomness"; SubTrack++, arXiv 2502.01586.
"""

import jax
import jax.numpy as jnp

from subtrack_jax._internal.leading_directions import (
    leading_eigenvector,
    leading_triple,
    range_finder,
)
from subtrack_jax._internal.matrix_functions import cosine_and_sinc, polar_factor
from subtrack_jax._internal.orthonormal import orthonormal_columns, singular_values
from subtrack_jax._internal.products import (
    dot,
    power_of_two,
    real_only,
    unit_scale,
    with_signs_of,
)

__all__ = [
    "align",
    "captured_energy",
    "exponential_map",
    "geodesic",
    "leading_eigenvector",
    "leading_triple",
    "line_search",
    "orthonormalize",
    "principal_angles",
    "random_basis",
    "random_tangent",
    "range_finder",
    "tangent",
]


@real_only
def tangent(
    basis: jax.Array, gradient: jax.Array, scale: jax.Array | float = 1.0
) -> jax.Array:
    """Steepest-descent direction of the projection error, up to a factor 2.

    The cost |S A - G|_F^2, minimised over the coordinates A, has the Grassmann
    gradient -2 R A^T with A = S^T G and R = G - S A (SubTrack++, section 3).
    This returns R A^T without ever forming the m x n residual R.

    Args:
      basis: orthonormal, of shape (m, r).
      gradient: (m, n).
      scale: takes the tangent at `gradient / scale` without dividing the
        gradient; see `power_of_two` of the products module.

    Returns:
      X = (I - S S^T) G A^T, of shape (m, r), orthogonal to the basis.
    """
    product = gradient @ (gradient.T @ basis / scale) / scale
    return product - basis @ (basis.T @ product)


@real_only
def geodesic(
    basis: jax.Array, u: jax.Array, v: jax.Array, angle: jax.Array | float
) -> jax.Array:
    """Rotates the direction S v of a basis towards u by an angle.

    S(theta) = S + (S v (cos theta - 1) + u sin theta) v^T: the geodesic along
    the tangent u v^T (Edelman et al., equation 2.65, for one direction;
    SubTrack++, equation 5).

    Args:
      basis: orthonormal, of shape (m, r).
      u: unit vector of shape (m,), orthogonal to the basis.
      v: unit vector of shape (r,).
      angle: radians, a scalar.

    Returns:
      An orthonormal basis of shape (m, r).

    Example:
      >>> import jax.numpy as jnp
      >>> basis = jnp.eye(3, 1)
      >>> turned = geodesic(basis, jnp.eye(3)[2], jnp.ones(1), jnp.pi / 2)
      >>> [round(float(x), 6) + 0.0 for x in turned[:, 0]]
      [0.0, 0.0, 1.0]
    """
    turned = dot(basis, v) * (jnp.cos(angle) - 1) + u * jnp.sin(angle)
    return basis + jnp.outer(turned, v)


@real_only
def line_search(
    basis: jax.Array, gradient: jax.Array, u: jax.Array, v: jax.Array
) -> jax.Array:
    """Line search: angle at which the geodesic captures the most of a gradient.

    With a = G^T S v and b = G^T u, the energy |S(theta)^T G|_F^2 is
    |cos(theta) a + sin(theta) b|^2 plus a constant, which is largest at
    theta = atan2(2 a.b, |a|^2 - |b|^2) / 2. No hyper-parameter, and unchanged
    when the gradient is rescaled, however small or large it is.

    Args:
      basis: orthonormal, of shape (m, r).
      gradient: (m, n).
      u: unit vector of shape (m,), orthogonal to the basis.
      v: unit vector of shape (r,).

    Returns:
      The angle in radians, a scalar; 0 when there is nothing to gain.
    """
    pair = jnp.stack([dot(basis, v), u]) @ gradient
    a, b = pair / power_of_two(pair)
    sine, cosine = 2 * jnp.vdot(a, b), jnp.vdot(a, a) - jnp.vdot(b, b)
    # At (0, 0) the angle has no derivative.
    return jnp.arctan2(sine, jnp.where((sine == 0) & (cosine == 0), 1, cosine)) / 2


@real_only
@jax.jit
def exponential_map(basis: jax.Array, tangent: jax.Array) -> jax.Array:
    """Follows the geodesic from a basis along a general tangent, to time 1.

    With the thin SVD X = U Sigma W^T the end point is S W cos(Sigma) W^T +
    U sin(Sigma) W^T + S (I - W W^T) (Edelman et al., theorem 2.3). Written with
    H = X^T X it is S cos(sqrt H) + X sinc(sqrt H): two entire functions of an
    r x r matrix, for which nothing is decomposed.

    Args:
      basis: orthonormal S of shape (m, r).
      tangent: X of shape (m, r), orthogonal to the basis. Its singular values
        are the principal angles to move by, in radians.

    Returns:
      An orthonormal basis of shape (m, r).
    """
    cosine, sinc = cosine_and_sinc(dot(tangent.T, tangent))
    return dot(basis, cosine) + dot(tangent, sinc)


@real_only
def random_basis(
    key: jax.Array, m: int, rank: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Uniformly random subspace: the Q factor of a Gaussian matrix.

    Args:
      key: a PRNG key.
      m: rows, the dimension of the space.
      rank: columns, at most `m`.
      dtype: float32 or float64.

    Returns:
      An orthonormal basis of shape (m, rank).
    """
    return orthonormal_columns(jax.random.normal(key, (m, rank), dtype))


@real_only
@jax.jit
def random_tangent(key: jax.Array, basis: jax.Array) -> jax.Array:
    """Random tangent whose largest singular value is one.

    X = (I - S S^T) Z with Gaussian Z (GrassWalk, arXiv 2510.01878), rescaled so
    that `exponential_map(basis, angle * X)` moves the subspace by `angle`.

    Args:
      key: a PRNG key.
      basis: orthonormal, of shape (m, r).

    Returns:
      A tangent of shape (m, r); zero if the basis already spans everything.
    """
    draw = jax.random.normal(key, basis.shape, basis.dtype)
    tangent = draw - dot(basis, dot(basis.T, draw))
    sigma, _, _ = leading_triple(tangent, basis)
    return tangent / jnp.where(sigma > 0, sigma, 1)


@real_only
def orthonormalize(basis: jax.Array) -> jax.Array:
    """Re-orthonormalises a nearly orthonormal basis (Newton-Schulz step).

    One Newton-Schulz step, S (3 I - S^T S) / 2: matrix products only, and an
    error e in S^T S - I becomes 3/4 e^2.

    Args:
      basis: (m, r), with |S^T S - I| well below 1.

    Returns:
      The basis of the same subspace, of shape (m, r).
    """
    gram = dot(basis.T, basis)
    # S (3 I - S^T S) / 2 = S + S E: E is small, so its product may be rounded.
    error = (jnp.eye(gram.shape[0], dtype=gram.dtype) - gram) / 2
    return basis + basis @ error


@real_only
@jax.jit
def align(basis: jax.Array, other: jax.Array) -> jax.Array:
    """Rotates a basis within its span to the closest to another one (Procrustes).

    The orthogonal Procrustes problem: S Q is nearest to T for the orthogonal factor
    Q of the polar decomposition of S^T T (Schönemann 1966), found here by
    Newton-Schulz iteration, in products only.

    Args:
      basis: orthonormal S of shape (m, r).
      other: orthonormal T of shape (m, r). Where a direction of it is within 1e-4
        radians of being orthogonal to the span of S, nothing tells its counterpart,
        which is then any.

    Returns:
      An orthonormal basis of the span of S, of shape (m, r).
    """
    factor = polar_factor(dot(basis.T, other))
    rotation = orthonormal_columns(factor)  # singular values are not yet 1
    return dot(basis, with_signs_of(rotation, factor))


@real_only
def principal_angles(basis: jax.Array, other: jax.Array) -> jax.Array:
    """Angles between two subspaces, largest first.

    Sines and cosines are both computed and combined (Björck & Golub 1973), so
    that angles near 0 and near pi/2 are equally accurate. For diagnostics: it
    takes an SVD of an m x r matrix.

    Args:
      basis: orthonormal, of shape (m, r).
      other: orthonormal, of shape (m, r).

    Returns:
      r angles in [0, pi/2], in radians.

    Example:
      >>> import jax.numpy as jnp
      >>> basis, other = jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]
      >>> [round(float(x), 4) + 0.0 for x in principal_angles(basis, other)]
      [1.5708, 0.0]
    """
    overlap = dot(basis.T, other)
    cosines = singular_values(overlap)
    sines = singular_values(other - dot(basis, overlap))
    return jnp.arctan2(sines, cosines[::-1])


@real_only
def captured_energy(basis: jax.Array, gradient: jax.Array) -> jax.Array:
    """Fraction of a gradient's squared norm that lies in the subspace.

    Args:
      basis: orthonormal, of shape (m, r).
      gradient: (m, n).

    Returns:
      |S^T G|_F^2 / |G|_F^2, a scalar in [0, 1]; 1 for a zero gradient, of
      which nothing is lost.

    Example:
      >>> import jax.numpy as jnp
      >>> float(captured_energy(jnp.eye(2, 1), jnp.diag(jnp.array([3.0, 4.0]))))
      0.36000001430511475
    """
    gradient = unit_scale(gradient)
    total = jnp.sum(gradient * gradient)
    captured = jnp.sum(dot(basis.T, gradient) ** 2)
    return jnp.where(total > 0, captured / jnp.where(total > 0, total, 1), 1)
