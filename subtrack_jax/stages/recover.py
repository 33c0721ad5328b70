"""Recovery, the last stage: full-size updates with the scaled residual."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from subtrack_jax._internal import placement
from subtrack_jax._internal.products import root
from subtrack_jax._internal.trees import Pair, unzip
from subtrack_jax._internal.validation import check_factor, check_precise
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_records, expect_shapes, expect_state
from subtrack_jax.stages.record import LowRankLeaf, map_records
from subtrack_jax.stages.stage import stage

Residual = Literal["exact", "published"]


class RecoverAndScaleState(NamedTuple):
    """State of the growth limiter: norms of the last step.

    Attributes:
      recovery_norm: Frobenius norm of the last term that was limited, of each matrix,
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
    each column with the factor by which the rule changed the part inside (Fira, arXiv
    2410.01623, section 3; SubTrack++, equations 10 to 12). The limiter
    gamma = min(1, growth_limit * l / |L|) keeps the norm of the recovered term
    from growing faster than `growth_limit` a step over its last norm l. A last
    norm of zero limits nothing.

    L is never formed: the update is S (scale N - gamma A diag(phi)) + G
    diag(gamma phi), and |L|^2 = sum_j phi_j^2 (|G_:j|^2 - |A_:j|^2) because S
    is orthonormal. That leaves one m x n x r product here, one in `project`.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      scale: alpha, the factor of the part inside of the subspace.
      recovery: "columns" as above, or "none" for the part inside alone.
      recovery_scale: factor of the part outside, applied after the limiter.
      growth_limit: zeta, at least 1; None for no limiter.
      residual: "exact" as above; "published" is G - scale S A, as the published
        code of Fira and SubTrack has it, which adds back some of what is inside:
        for comparisons with it.

    Returns:
      A transformation from records back to plain updates in the gradient's
      dtype (see `project`), to be chained after the inner rule.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_factor("scale", scale)
    check_factor("recovery_scale", recovery_scale)
    if recovery not in ("columns", "none"):
        raise ValueError(f"recovery={recovery!r}: use 'columns' or 'none'.")
    if residual not in ("exact", "published"):
        raise ValueError(f"residual={residual!r}: use 'exact' or 'published'.")

    def lift(record: LowRankLeaf, last_norm: jax.Array | None, *, scale, **_) -> Pair:
        inside = scale * placement.unsplit_rank(record.direction)
        return _finished(record, record.view.lift(record.basis, inside), last_norm)

    def recover(
        record: LowRankLeaf,
        last_norm: jax.Array | None,
        *,
        scale: Any,
        recovery_scale: Any,
        growth_limit: Any,
    ) -> Pair:
        view, coordinates = record.view, placement.unsplit_rank(record.coordinates)
        direction = placement.unsplit_rank(record.direction)
        gradient = record.gradient.astype(coordinates.dtype)
        energy, phi = _energy_and_ratio(coordinates, direction, axis=-2)
        removed = scale if residual == "published" else 1
        # |G_:j - c S A_:j|^2 = |G_:j|^2 - c (2 - c) |A_:j|^2
        inside_energy = removed * (2 - removed) * energy
        missed = jnp.maximum(view.column_energy(gradient) - inside_energy, 0)
        norm = root(jnp.sum(phi * phi * missed, axis=-1))
        gamma, limited = _limiter(norm, last_norm, growth_limit)
        factors = jnp.multiply(recovery_scale, gamma)[..., None] * phi
        inside = view.lift(
            record.basis,
            scale * direction - removed * factors[..., None, :] * coordinates,
        )
        update = inside + view.scale_columns(gradient, factors)
        return _finished(record, update, limited)

    finish = lift if recovery == "none" else recover
    limit = None if recovery == "none" else growth_limit
    values = {"scale": scale, "recovery_scale": recovery_scale}
    return _last_stage("recover_and_scale", low_rank, finish, limit, values)


def scale_gradient(
    low_rank: LowRank,
    scale: jax.typing.ArrayLike = 1.0,
    per: Literal["columns", "matrix"] = "columns",
    growth_limit: jax.typing.ArrayLike | None = 1.01,
) -> optax.GradientTransformationExtraArgs:
    """Scales the gradient itself as the inner rule scaled its projection.

    With phi_j = |N_:j| / |A_:j| the update is scale * gamma * G diag(phi); with one
    phi = |N| / |A| for all columns it is scale * gamma * phi * G (APOLLO and
    APOLLO-Mini, Zhu et al. 2024, arXiv 2412.05270, algorithm 1). No direction is
    lifted back, so that a basis need not be orthonormal. The limiter gamma is that of
    `recover_and_scale`, on the norm of the whole update.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      scale: factor of the update.
      per: "columns" for a factor per column, "matrix" for one per matrix.
      growth_limit: zeta, at least 1; None for no limiter.

    Returns:
      A transformation from records back to plain updates in the gradient's
      dtype (see `project`), to be chained after the inner rule.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_factor("scale", scale)
    if per not in ("columns", "matrix"):
        raise ValueError(f"per={per!r}: use 'columns' or 'matrix'.")

    def finish(
        record: LowRankLeaf,
        last_norm: jax.Array | None,
        *,
        scale: Any,
        growth_limit: Any,
    ) -> Pair:
        coordinates = placement.unsplit_rank(record.coordinates)
        direction = placement.unsplit_rank(record.direction)
        gradient = record.gradient.astype(coordinates.dtype)
        axes = -2 if per == "columns" else (-2, -1)
        _, phi = _energy_and_ratio(coordinates, direction, axes)
        energy = record.view.column_energy(gradient)
        phi = jnp.broadcast_to(
            phi if per == "columns" else phi[..., None], energy.shape
        )
        norm = root(jnp.sum(phi * phi * energy, axis=-1))
        gamma, limited = _limiter(norm, last_norm, growth_limit)
        factors = jnp.multiply(scale, gamma)[..., None] * phi
        update = record.view.scale_columns(gradient, factors)
        return _finished(record, update, limited)

    values = {"scale": scale}
    return _last_stage("scale_gradient", low_rank, finish, growth_limit, values)


def _energy_and_ratio(
    coordinates: jax.Array, direction: jax.Array, axis: Any
) -> tuple[jax.Array, jax.Array]:
    """|A|^2 and phi = |N| / |A| (0 where A is 0), over the given axes."""
    energy = jnp.sum(coordinates * coordinates, axis=axis)
    ratio = jnp.sum(direction * direction, axis)
    return energy, root(ratio / jnp.where(energy > 0, energy, jnp.inf))


def _limiter(
    norm: jax.Array,
    last_norm: jax.Array | None,
    growth_limit: Any,
) -> tuple[jax.Array, jax.Array]:
    """The factor min(1, zeta l / |L|), and |L| times it; l is the last such norm."""
    if last_norm is None or (
        isinstance(growth_limit, float) and math.isinf(growth_limit)
    ):
        return jnp.ones_like(norm), norm
    has_last = last_norm > 0
    limit = jnp.where(has_last, last_norm, 1) * growth_limit
    is_limited = has_last & (norm > limit)
    limited = jnp.where(is_limited, limit, norm)
    # Nonzero in both branches of the select: jax_debug_nans checks each.
    return jnp.where(is_limited, limit, 1) / jnp.where(is_limited, norm, 1), limited


def _finished(record: LowRankLeaf, update: jax.Array, norm: jax.Array | None) -> Pair:
    """The matrix of an update, and the norm for the next limit, if any."""
    return Pair(update.astype(record.gradient.dtype), norm)


def _last_stage(
    name: str,
    low_rank: LowRank,
    finish: Callable[..., Pair],
    growth_limit: jax.typing.ArrayLike | None,
    values: dict[str, jax.typing.ArrayLike],
) -> optax.GradientTransformationExtraArgs:
    """Builds a stage from records to updates, with norms in its state for a limit.

    Args:
      name: name of the stage.
      low_rank: the same as in the other stages.
      finish: from a record, its last norm, the growth limit and the values to the
        matrix of its update and its new norm.
      growth_limit: None for no limiter.
      values: the other hyper-parameters of `finish`.

    Returns:
      The transformation.
    """
    if growth_limit is not None:
        check_precise(
            "growth_limit", growth_limit, lambda x: x >= 1, "at least 1, or None", 1.01
        )

    def init_fn(params):
        if growth_limit is None:
            return optax.EmptyState()
        views = low_rank.views(params)
        return RecoverAndScaleState(placement.norms_like(params, views))

    def update_fn(updates, state, *, values, **extra_args):
        del extra_args
        # Jitted, so that equal leaves are traced once.
        finish_one = jax.jit(functools.partial(finish, **values))

        def to_leaf(record, last_norm=None):
            pair = record.map(finish_one, last_norm)
            first = record.view.leaf(pair.first)
            if last_norm is None:
                return Pair(first, None)
            return Pair(first, pair.second.astype(last_norm.dtype))

        if growth_limit is None:
            expect_state(name, optax.EmptyState, state)
            update = lambda record: to_leaf(record).first
            return map_records(update, lambda g: g, updates), state
        expect_state(name, RecoverAndScaleState, state)
        views = map_records(lambda record: record.view, lambda _: None, updates)
        norms, field = state.recovery_norm, "recovery_norm"
        expect_shapes(name, field, norms, updates, views, lambda x: x.batch_shape)
        pairs = map_records(
            to_leaf,
            lambda g, _: Pair(g, optax.MaskedNode()),
            updates,
            norms,
        )
        new_updates, norms = unzip(pairs)
        return new_updates, RecoverAndScaleState(norms)

    return stage(
        init_fn,
        Partial(update_fn, values=values | {"growth_limit": growth_limit}),
        expect_records(name, low_rank, "direction"),
    )
