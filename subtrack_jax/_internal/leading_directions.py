"""Leading singular directions of a matrix, by products and loops alone."""

import functools

import jax
import jax.numpy as jnp

from subtrack_jax._internal.loops import fori_loop, while_loop
from subtrack_jax._internal.orthonormal import orthonormal_columns
from subtrack_jax._internal.products import dot, norm, real_only, safe_norm, unit_scale

_MOST_SQUARINGS = 27


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
        # The loop is bounded because an exact tie does not converge.
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
      gradient: (m, n); any scale, rank-deficient as well. For zero the
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
    # Uniform numbers: normal ones need the inverse error function, slow to compile.
    noise = jax.random.uniform(key, (max(m, n), sketch_size), gradient.dtype, -1, 1)
    is_zero = ~jnp.any(gradient != 0)

    def power(_, carry):
        # G^T Q is not orthonormalised in between. That loses the directions with
        # singular values, squared, below rounding times the first one's: in
        # float32, 1e-7 of its energy each.
        _, sketch = carry
        image = unit_scale(_product(gradient, sketch))
        # QR of zeros gives the same columns every time, so keep random ones.
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


def _product(matrix: jax.Array, columns: jax.Array) -> jax.Array:
    """`matrix @ columns`, 64 columns at a time: half the code for TPUs to compile."""
    return jax.lax.map(lambda x: matrix @ x, columns.T, batch_size=64).T
