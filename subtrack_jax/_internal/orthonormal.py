"""QR and singular values, by LAPACK or in loops of products.

The library's factorisations run one matrix after another under `vmap`: on CPUs the
batched ones of several leaves wait for each other's threads and never finish (seen
with jaxlib 0.10.2).
"""

import jax
import jax.numpy as jnp

from subtrack_jax._internal.loops import fori_loop, while_loop
from subtrack_jax._internal.products import dot, replicated, safe_norm

# Columns per panel.
_PANEL = 128
# Maximum passes per panel (five observed, for linearly dependent columns).
_PASSES = 8


@jax.custom_jvp
def orthonormal_columns(matrix: jax.Array) -> jax.Array:
    """The Q of a QR factorisation: orthonormal for rank-deficient matrices too."""
    # The TPU compiler unrolls its own QR: half a minute for 2736 x 512.
    q = jax.lax.platform_dependent(
        replicated(matrix), tpu=blocked_q, default=_library_q
    )
    return replicated(q)


@orthonormal_columns.defjvp
def _orthonormal_columns_jvp(primals, tangents):
    # With dA = dQ R + Q dR: Q^T dQ is antisymmetric and dR R^-1 upper triangular
    # (Walter, Lehmann & Lamour 2012, section 3.1).
    (matrix,), (slope,) = primals, tangents
    q = orthonormal_columns(matrix)
    r = jnp.triu(dot(q.T, matrix))
    # A dependent column has an arbitrary Q, whose derivative is set to zero.
    size = jnp.abs(jnp.diagonal(r))
    is_free = size > matrix.shape[0] * jnp.finfo(r.dtype).eps * jnp.max(size)
    r = jnp.where(is_free, r, jnp.eye(r.shape[0], dtype=r.dtype))
    slope = jnp.where(is_free, slope, 0)
    scaled = jax.lax.linalg.triangular_solve(r, slope, left_side=False)
    inside = dot(q.T, scaled)
    below = jnp.tril(inside, -1)
    return q, scaled + dot(q, below - below.T - inside)


def blocked_q(matrix: jax.Array) -> jax.Array:
    """The Q of a QR factorisation, whose R has a positive diagonal for full rank.

    Panel after panel is freed of what lies in those before, and made orthonormal by
    the Cholesky factor of its Gram matrix (Stathopoulos & Wu 2002), with a small shift
    that keeps it regular (Fukaya et al. 2020), until rounding is all that is left:
    twice or three times as a rule. The TPU compiler takes seconds over these loops,
    and half a minute over its own QR.

    Args:
      matrix: (m, r), r <= m; any rank. Those of a stack that is mapped
        over take as many passes as the one that needs most.

    Returns:
      Orthonormal columns of shape (m, r) whose leading ones span what the leading
      ones of `matrix` span, in float32 to rounding. Columns that depend on those
      before give way to what is left of a cosine.
    """
    m, rank = matrix.shape
    width = min(_PANEL, rank)
    rounding = jnp.asarray(jnp.finfo(matrix.dtype).eps, matrix.dtype)
    index = jnp.arange(rank)

    def of_panel(k, columns):
        # The last panel overlaps the one before, whose columns are already orthonormal.
        start = jnp.minimum(k * width, rank - width)
        before = jnp.where((index < start)[None], columns, 0)
        panel = jax.lax.dynamic_slice_in_dim(columns, start, width, 1)

        def has_errors(carry):
            _, squared_error, passes = carry
            # Checked before the last pass, which squares a small error.
            return (passes < _PASSES) & (squared_error > rounding)

        def reduce_errors(carry):
            panel, _, passes = carry
            overlap = dot(before.T, panel)
            panel = _unit_columns(panel - dot(before, overlap))
            inner = dot(panel.T, panel) - jnp.eye(width, dtype=matrix.dtype)
            squared_error = jnp.sum(overlap**2) + jnp.sum(inner**2)
            return dot(panel, _inverse_factor(inner).T), squared_error, passes + 1

        carry = panel, jnp.full_like(rounding, jnp.inf), 0
        panel, *_ = while_loop(has_errors, reduce_errors, carry, _PASSES)
        return jax.lax.dynamic_update_slice_in_dim(columns, panel, start, 1)

    # Too little to matter, unless there is nothing else. The cosines are orthogonal
    # to each other, and on all rows, also those that a gradient has left out.
    row = jnp.arange(m, dtype=matrix.dtype) + 0.5
    cosines = jnp.cos(jnp.pi / m * jnp.outer(row, index.astype(matrix.dtype)))
    columns = _unit_columns(matrix) + 4 * rounding / m**0.5 * cosines
    return fori_loop(-(-rank // width), of_panel, _unit_columns(columns))


def _unit_columns(matrix: jax.Array) -> jax.Array:
    """Normalises columns, however small; zero columns stay zero."""
    largest = jnp.max(jnp.abs(matrix), axis=0, keepdims=True)
    matrix = matrix / jnp.where(largest > 0, largest, 1)
    return matrix / safe_norm(matrix, axis=0)


def _inverse_factor(error: jax.Array) -> jax.Array:
    """Inverse of the lower Cholesky factor of I + E, which has ones on its diagonal.

    For a small E one step of Newton's method on the factor, else elimination, which
    takes a step for every row.
    """
    size = error.shape[0]
    identity = jnp.eye(size, dtype=error.dtype)

    def newton():
        return identity - jnp.tril(error) + jnp.diag(jnp.diagonal(error)) / 2

    def eliminate(k, matrix):
        row = jax.lax.dynamic_slice_in_dim(matrix, k, 1)
        entries = jax.lax.dynamic_slice_in_dim(matrix, k, 1, 1)
        pivot = jax.lax.dynamic_slice_in_dim(row, k, 1, 1)
        below = jnp.arange(size)[:, None] > k
        return matrix - jnp.where(below, entries / pivot, 0) * row

    def elimination():
        # The shift exceeds the rounding error of pivots.
        shift = 2 * size * jnp.finfo(error.dtype).eps
        augmented = jnp.concatenate([(1 + shift) * identity + error, identity], axis=1)
        reduced = fori_loop(size, eliminate, augmented)
        return reduced[:, size:] * jax.lax.rsqrt(jnp.diagonal(reduced))[:, None]

    return jax.lax.cond(jnp.sum(error**2) < 0.01, newton, elimination)


@jax.custom_batching.sequential_vmap
def _library_q(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


@jax.custom_batching.sequential_vmap
def singular_values(matrix: jax.Array) -> jax.Array:
    """Singular values of a matrix, largest first."""
    return jnp.linalg.svd(replicated(matrix), compute_uv=False)
