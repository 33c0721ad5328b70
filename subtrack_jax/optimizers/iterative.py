"""The members of the family that change their subspaces a little on every step."""

from typing import Any, Literal

import jax
import optax

from subtrack_jax._internal.injection import with_values_as_operands
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.chains import assemble
from subtrack_jax.optimizers.iterative_trackers import online_pca, power_iteration
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.recover import recover_and_scale
from subtrack_jax.stages.track import track_subspace
from subtrack_jax.stages.tracker import Init

_Scalar = jax.typing.ArrayLike


@with_values_as_operands
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 1,
    b1: _Scalar = 0.908,
    b2: _Scalar = 0.99,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 1.0,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    monitor: bool = False,
    init: Init = "randomized",
    rho: _Scalar = 0.908,
    error_feedback: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: a power iteration on every step, and nothing dropped for good.

    Robert et al. 2024, arXiv 2410.16103. The subspace follows momentum and gradient,
    moments are transported, and what a step misses is added to the next gradient.
    That takes two more products of the size of a projection on every step, with error
    feedback four, and a buffer of the parameter's size: it saves Adam's second moment.

    Args: as in `subtrack`, without those of its tracker and of the recovery.
      update_interval: steps between two power iterations; 1 in the paper.
      rho: in [0, 1), weight of the momentum in what the power iteration looks at.
      error_feedback: whether what a step misses is kept for the next, and seen by
        `monitor`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = power_iteration(rho, init)
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        scale_by_projection_aware_adam(
            low_rank, b1, b2, eps, mu_dtype, moments_dtype=moments_dtype
        ),
        recover_and_scale(low_rank, scale, "none"),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
        feedback=(b1, error_feedback),
    )


@with_values_as_operands
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 1,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 0.25,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    monitor: bool = False,
    init: Init = "randomized",
    projection_optimizer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Online Subspace Descent: the projection is learned beside the weights.

    Liang et al. 2024, arXiv 2408.12857. An optimizer of its own lowers the error of
    the projection a little on every step; moments are kept and nothing is recovered.

    Args: as in `subtrack`, without those of its tracker and of the recovery.
      update_interval: steps between two steps of the projection; 1 in the paper.
      projection_optimizer: takes them, and its state is kept beside each basis; None
        for `optax.adam(5e-3)`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = online_pca(projection_optimizer, init)
    adam = scale_by_projection_aware_adam(
        low_rank, b1, b2, eps, mu_dtype, transport=False, moments_dtype=moments_dtype
    )
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        adam,
        recover_and_scale(low_rank, scale, "none"),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )
