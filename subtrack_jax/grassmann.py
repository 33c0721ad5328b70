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

import functools

import jax
import jax.numpy as jnp

from subtrack_jax._internal.loops import fori_loop, while_loop
from subtrack_jax._internal.orthonormal import orthonormal_columns
from subtrack_jax._internal.products import (
    dot,
    norm,
    power_of_two,
    real_only,
    safe_norm,
    unit_scale,
    with_signs_of,
)

_MOST_SQUARINGS = 27
# Doublings of an angle: enough for the largest number of float32.
_MOST_DOUBLINGS = 64


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
      gradient: of shape (m, n).
      scale: takes the tangent at `gradient / scale` without dividing the
        gradient; see `linear_algebra.power_of_two`.

    Returns:
      X = (I - S S^T) G A^T, of shape (m, r), orthogonal to the basis.
    """
    product = gradient @ (gradient.T @ basis / scale) / scale
    return product - basis @ (basis.T @ product)


@real_only
@jax.jit
def leading_eigenvector(gram: jax.Array) -> jax.Array:
    """Unit eigenvector of the largest eigenvalue of a positive matrix.

    Repeated squaring: k squarings do the work of 2^k power iterations and are
    matrix products only. They stop once the powers are nearly of rank one.

    Args:
      gram: symmetric positive semi-definite, of shape (r, r).

    Returns:
      A vector of shape (r,); all zeros if `gram` is.
    """

    def unit_trace(matrix):
        trace = jnp.trace(matrix)
        return matrix / jnp.where(trace > 0, trace, 1)

    def squared(carry):
        # With unit trace, 1 - |K|_F^2 is about twice the weight of all but the
        # first eigenvalue; 1e-4 squared three times is below any rounding.
        matrix, squarings, last = carry
        is_nearly_one = 1 - jnp.sum(matrix * matrix) <= 1e-4
        last += is_nearly_one.astype(last.dtype)
        return unit_trace(matrix @ matrix), squarings + 1, last

    power, _, _ = while_loop(
        # The bound on the count is for an exact tie.
        lambda carry: (carry[1] < _MOST_SQUARINGS) & (carry[2] < 3),
        squared,
        # Scaled, as a derivative divides by the square of the trace.
        (unit_trace(unit_scale(gram)), *[jnp.zeros([], jnp.int32)] * 2),
        _MOST_SQUARINGS,
    )
    column = power[:, jnp.argmax(jnp.diagonal(power))]
    return column / safe_norm(column)


@real_only
@jax.jit
def leading_triple(
    tangent: jax.Array, basis: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Leading singular triple of a tangent, from r x r products alone.

    Args:
      tangent: X of shape (m, r), orthogonal to `basis`.
      basis: orthonormal, of shape (m, r).

    Returns:
      (sigma, u, v) with X ~ sigma u v^T: a scalar >= 0 and unit vectors of
      shapes (m,) and (r,). For X = 0 all three are zero.
    """
    v = leading_eigenvector(tangent.T @ tangent)
    image = dot(tangent, v)
    for _ in range(2):  # X is orthogonal to S up to rounding, u has to be
        image -= dot(basis, dot(basis.T, image))
    u = unit_scale(image)
    return norm(image), u / safe_norm(u), v


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
    """Angle at which the geodesic captures the most of a gradient.

    With a = G^T S v and b = G^T u, the energy |S(theta)^T G|_F^2 is
    |cos(theta) a + sin(theta) b|^2 plus a constant, which is largest at
    theta = atan2(2 a.b, |a|^2 - |b|^2) / 2. No hyper-parameter, and unchanged
    when the gradient is rescaled, however small or large it is.

    Args:
      basis: orthonormal, of shape (m, r).
      gradient: of shape (m, n).
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
    r x r matrix, summed here by Taylor series after halving the angles, so that
    nothing is decomposed.

    Args:
      basis: orthonormal S of shape (m, r).
      tangent: X of shape (m, r), orthogonal to the basis. Its singular values
        are the principal angles to move by, in radians.

    Returns:
      An orthonormal basis of shape (m, r).
    """
    gram = dot(tangent.T, tangent)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    # The trace bounds the largest eigenvalue: halve until every angle is <= 1.
    bound = jax.lax.stop_gradient(jnp.maximum(jnp.trace(gram), 1.0))
    halvings = jnp.ceil(jnp.log2(bound) / 2)
    small = gram / 4.0**halvings

    # Loops, as the TPU compiler takes seconds over each product at this precision.
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
    return dot(basis, cosine) + dot(tangent, sinc)


@real_only
@functools.partial(
    jax.jit, static_argnames=("rank", "oversampling", "power_iterations")
)
def range_finder(
    key: jax.Array,
    gradient: jax.Array,
    rank: int,
    oversampling: int | None = None,
    power_iterations: int = 8,
) -> jax.Array:
    """Basis of the leading left singular directions, by random projections.

    Subspace iteration on a random sketch (Halko et al., algorithm 4.4), then
    orthogonal iteration within the sketched subspace to keep its best `rank`
    directions. Products and QR only: it compiles to little code
    on every backend, where an SVD takes the TPU compiler minutes.

    Args:
      key: a PRNG key.
      gradient: of shape (m, n); any scale, rank-deficient as well. For zero the
        basis is random: on coordinate axes, a gradient that lives on other rows
        would never be found.
      rank: columns of the basis, at most min(m, n).
      oversampling: further directions to sketch; None takes max(32, rank // 4).
      power_iterations: products with G G^T. More help when the singular values
        decay slowly.

    Returns:
      An orthonormal basis of shape (m, rank).
    """
    m, n = gradient.shape
    extra = max(32, rank // 4) if oversampling is None else oversampling
    sketch_size = min(rank + extra, m, n)
    # Not normal numbers: the inverse error function is slow to compile.
    noise = jax.random.uniform(key, (max(m, n), sketch_size), gradient.dtype, -1, 1)
    is_zero = ~jnp.any(gradient != 0)

    def power(_, carry):
        # G^T Q is not orthonormalised in between. That loses the directions with
        # singular values, squared, below rounding times the first one's: in
        # float32, 1e-7 of its energy each.
        _, sketch = carry
        image = unit_scale(_product(gradient, sketch))
        # The factorisation of zeros would answer with the same columns every time.
        columns = orthonormal_columns(jnp.where(is_zero, noise[:m], image))
        return columns, unit_scale(_product(gradient.T, columns))

    columns, sketch = fori_loop(
        power_iterations + 1,
        power,
        (jnp.zeros((m, sketch_size), gradient.dtype), noise[:n]),
    )
    gram = sketch.T @ sketch
    best = fori_loop(
        32,
        lambda _, basis: orthonormal_columns(gram @ basis),
        jnp.eye(sketch_size, rank, dtype=gradient.dtype),
    )
    return dot(columns, best)


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
    """Removes the rounding from a nearly orthonormal basis.

    One Newton-Schulz step, S (3 I - S^T S) / 2: matrix products only, and an
    error e in S^T S - I becomes 3/4 e^2.

    Args:
      basis: of shape (m, r) with |S^T S - I| well below 1.

    Returns:
      The basis of the same subspace, of shape (m, r).
    """
    gram = dot(basis.T, basis)
    # S (3 I - S^T S) / 2 = S + S E: E is small, its product forgives rounding.
    error = (jnp.eye(gram.shape[0], dtype=gram.dtype) - gram) / 2
    return basis + basis @ error


@real_only
@jax.jit
def align(basis: jax.Array, other: jax.Array) -> jax.Array:
    """Rotates a basis within its span to be as near another one as it can.

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
    overlap = dot(basis.T, other)
    # Each turn multiplies small singular values by 3/2, and brings all nearer to 1.
    factor = fori_loop(32, lambda _, x: 1.5 * x - 0.5 * dot(x, dot(x.T, x)), overlap)
    rotation = orthonormal_columns(factor)  # those that did not arrive, too
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
    cosines = jnp.linalg.svd(overlap, compute_uv=False)
    sines = jnp.linalg.svd(other - dot(basis, overlap), compute_uv=False)
    return jnp.arctan2(sines, cosines[::-1])


@real_only
def captured_energy(basis: jax.Array, gradient: jax.Array) -> jax.Array:
    """Fraction of a gradient's squared norm that lies in the subspace.

    Args:
      basis: orthonormal, of shape (m, r).
      gradient: of shape (m, n).

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


def _product(matrix: jax.Array, columns: jax.Array) -> jax.Array:
    """`matrix @ columns`, 64 columns at a time: half the code for TPUs to compile."""
    return jax.lax.map(lambda x: matrix @ x, columns.T, batch_size=64).T
