"""The members of the family whose subspaces are random."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.injection import with_values_as_operands
from subtrack_jax._internal.validation import check_factor
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.chains import assemble
from subtrack_jax.stages import trackers
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.draw_projection import draw_projection
from subtrack_jax.stages.recover import recover_and_scale, scale_gradient
from subtrack_jax.stages.track import track_subspace
from subtrack_jax.stages.tracker import Init

_Scalar = jax.typing.ArrayLike


@with_values_as_operands
def grass_walk(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 200,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 0.25,
    recovery_scale: _Scalar = 1.0,
    growth_limit: _Scalar | None = 1.01,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    monitor: bool = False,
    init: Init = "randomized",
    angle: _Scalar = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """GrassWalk: a random walk on the Grassmannian in place of tracking.

    Rajabi et al. 2025, arXiv 2510.01878. Each refresh follows a random geodesic;
    moments and recovery are as in `subtrack`.

    Args: as in `subtrack`, with `angle` in place of `step_size` and `damping`.
      angle: largest principal angle between consecutive bases, in radians.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = trackers.random_walk(angle, init)
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        scale_by_projection_aware_adam(
            low_rank, b1, b2, eps, mu_dtype, moments_dtype=moments_dtype
        ),
        recover_and_scale(low_rank, scale, "columns", recovery_scale, growth_limit),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )


@with_values_as_operands
def grass_jump(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 200,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 0.25,
    recovery_scale: _Scalar = 1.0,
    growth_limit: _Scalar | None = 1.01,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    monitor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """GrassJump: a fresh random subspace at every refresh.

    Rajabi et al. 2025, arXiv 2510.01878. Moments and recovery are as in
    `subtrack`; the gradient is never looked at to choose a basis.

    Args: as in `subtrack`, without those of its tracker.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = trackers.random_jump()
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        scale_by_projection_aware_adam(
            low_rank, b1, b2, eps, mu_dtype, moments_dtype=moments_dtype
        ),
        recover_and_scale(low_rank, scale, "columns", recovery_scale, growth_limit),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )


@with_values_as_operands
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 200,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 1.0,
    growth_limit: _Scalar | None = 1.01,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    per: Literal["columns", "matrix"] = "columns",
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient, scaled as Adam scales a random projection of it.

    Zhu et al. 2024, arXiv 2412.05270. No basis is kept: a projection is drawn from the
    seed on every step, another one every `update_interval` steps, when moments stay
    as they are. The state holds 2 r n numbers, and updates have full rank.

    Args: as in `subtrack`, without those of its tracker.
      scale: alpha; the update is multiplied by its root, as in the paper.
      growth_limit: the update may grow by this factor a step; None for no limit.
      per: "columns" of the matrix have a factor each, or a "matrix" one alone.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    check_factor("scale", scale)
    root = scale**0.5 if isinstance(scale, (int, float)) else jnp.sqrt(scale)
    adam = scale_by_projection_aware_adam(
        low_rank, b1, b2, eps, mu_dtype, transport=False, moments_dtype=moments_dtype
    )
    return assemble(
        low_rank,
        draw_projection(low_rank, update_interval, seed),
        adam,
        scale_gradient(low_rank, root, per, growth_limit),
        end=(weight_decay, mask, learning_rate),
    )


@with_values_as_operands
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 1,
    update_interval: _Scalar = 200,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 128.0,
    growth_limit: _Scalar | None = 1.01,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    per: Literal["columns", "matrix"] = "matrix",
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: `apollo` with one direction and one factor for each matrix.

    Zhu et al. 2024, arXiv 2412.05270. The state holds 2 n numbers for an m x n matrix,
    hardly more than that of SGD.

    Args: as in `apollo`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    return apollo(
        learning_rate,
        rank=rank,
        update_interval=update_interval,
        b1=b1,
        b2=b2,
        eps=eps,
        scale=scale,
        growth_limit=growth_limit,
        weight_decay=weight_decay,
        mask=mask,
        side=side,
        dimension_numbers=dimension_numbers,
        seed=seed,
        mu_dtype=mu_dtype,
        moments_dtype=moments_dtype,
        per=per,
    )
