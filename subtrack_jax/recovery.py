"""The last stage: back to a full-size update, with what the subspace missed."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import sharding
from subtrack_jax._validation import check
from subtrack_jax.low_rank import LowRank
from subtrack_jax.record import (
    LowRankLeaf,
    Pair,
    expect_records,
    map_records,
    unzip,
)

Residual = Literal["exact", "published"]


class RecoverAndScaleState(NamedTuple):
    """What the growth limiter remembers.

    Attributes:
      recovery_norm: Frobenius norm of the last recovered term of each matrix,
        of shape (...), 0 before there was one; `optax.MaskedNode` for leaves
        that are not low-rank.
    """

    recovery_norm: optax.Updates


def recover_and_scale(
    low_rank: LowRank,
    scale: jax.typing.ArrayLike = 0.25,
    recovery: Literal["columns", "none"] = "columns",
    recovery_scale: jax.typing.ArrayLike = 1.0,
    growth_limit: jax.typing.ArrayLike | None = 1.01,
    residual: Residual = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Lifts the direction back and adds the rescaled residual.

    With the direction N of the inner rule and phi_j = |N_:j| / |A_:j|, the
    update is scale * S N + recovery_scale * gamma * L, where
    L = (G - S A) diag(phi) is the part of the gradient outside of the subspace,
    each column scaled as the rule scaled the part inside (Fira, arXiv
    2410.01623, section 3; SubTrack++, equations 10 to 12). The limiter
    gamma = min(1, growth_limit * l / |L|) keeps the norm of the recovered term
    from growing faster than `growth_limit` a step over its last norm l. A last
    norm of zero limits nothing.

    L is never formed: the update is S (scale N - gamma A diag(phi)) + G
    diag(gamma phi), and |L|^2 = sum_j phi_j^2 (|G_:j|^2 - |A_:j|^2) because S
    is orthonormal. That leaves one m x n x r product here, one in `project`.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      scale: alpha, of the part inside of the subspace.
      recovery: "columns" as above, or "none" for the part inside alone.
      recovery_scale: of the part outside, applied after the limiter.
      growth_limit: zeta, at least 1; None for no limiter.
      residual: "exact" as above; "published" is G - scale S A, as the published
        code of Fira and SubTrack has it, which adds back some of what is inside:
        for comparisons with it.

    Returns:
      A transformation from records back to plain updates in the gradient's
      dtype, to be chained after the inner rule.

    Raises:
      ValueError: if an argument is out of its range.
    """
    finite = lambda x: 0 <= x < float("inf")
    check("scale", scale, finite, "a finite number, 0 or above")
    check("recovery_scale", recovery_scale, finite, "a finite number, 0 or above")
    if recovery not in ("columns", "none"):
        raise ValueError(f"recovery={recovery!r}: use 'columns' or 'none'.")
    if residual not in ("exact", "published"):
        raise ValueError(f"residual={residual!r}: use 'exact' or 'published'.")
    if growth_limit is not None:
        check("growth_limit", growth_limit, lambda x: x >= 1, "at least 1, or None")
    is_limited = recovery == "columns" and growth_limit is not None
    zeta = 1.0 if growth_limit is None else growth_limit

    def init_fn(params):
        if not is_limited:
            return optax.EmptyState()
        views = low_rank.views(params)
        return RecoverAndScaleState(sharding.norms_like(params, views))

    def update_fn(updates, state, **extra_args):
        del extra_args
        if recovery == "none":
            lift = lambda record: _lift(
                record, sharding.local(scale) * sharding.whole_rank(record.direction)
            )
            return map_records(lift, lambda g: g, updates), state
        if not is_limited:
            recover = lambda record: _recover(record, None).first
            return map_records(recover, lambda g: g, updates), state
        pairs = map_records(
            _recover,
            lambda g, _: Pair(g, optax.MaskedNode()),
            updates,
            state.recovery_norm,
        )
        new_updates, norms = unzip(pairs)
        return new_updates, RecoverAndScaleState(norms)

    def _recover(record: LowRankLeaf, last_norm: jax.Array | None) -> Pair:
        view, coordinates = record.view, sharding.whole_rank(record.coordinates)
        direction = sharding.whole_rank(record.direction)
        gradient = record.gradient.astype(coordinates.dtype)
        energy = jnp.sum(coordinates * coordinates, axis=-2)
        phi = jnp.where(
            energy > 0,
            jnp.sqrt(
                jnp.sum(direction * direction, axis=-2)
                / jnp.where(energy > 0, energy, 1)
            ),
            0,
        )
        alpha = sharding.local(scale)
        removed = alpha if residual == "published" else 1
        # |G_:j - c S A_:j|^2 = |G_:j|^2 - c (2 - c) |A_:j|^2
        inside_energy = removed * (2 - removed) * energy
        missed = jnp.maximum(view.column_energy(gradient) - inside_energy, 0)
        norm = jnp.sqrt(jnp.sum(phi * phi * missed, axis=-1))
        if last_norm is None:
            gamma = jnp.ones_like(norm)
        else:
            limit = last_norm * sharding.local(zeta)
            gamma = jnp.where((limit > 0) & (norm > limit), limit / norm, 1)
        factors = jnp.multiply(sharding.local(recovery_scale), gamma)[..., None] * phi
        inside = view.lift(
            record.basis,
            alpha * direction - removed * factors[..., None, :] * coordinates,
        )
        update = inside + view.scale_columns(gradient, factors)
        return Pair(
            record.boxed(update.astype(record.gradient.dtype)),
            (gamma * norm).astype(norm.dtype),
        )

    def _lift(record: LowRankLeaf, direction: jax.Array):
        update = record.view.lift(record.basis, direction)
        return record.boxed(update.astype(record.gradient.dtype))

    return sharding.stage(
        init_fn, update_fn, expect_records("recover_and_scale", low_rank, "direction")
    )
