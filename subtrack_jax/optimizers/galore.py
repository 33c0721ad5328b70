"""The members of the family that take singular vectors anew at every refresh."""

from typing import Any, Literal

import jax
import optax

from subtrack_jax._internal.injection import with_values_as_operands
from subtrack_jax._internal.validation import check_steps
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.chains import assemble
from subtrack_jax.stages import trackers
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.recover import Residual, recover_and_scale
from subtrack_jax.stages.track import track_subspace
from subtrack_jax.stages.tracker import Init, switch
from subtrack_jax.stages.trackers import Align

_Scalar = jax.typing.ArrayLike


@with_values_as_operands
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 200,
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
    align: Align = "none",
) -> optax.GradientTransformationExtraArgs:
    """GaLore: the leading singular subspace of the gradient, taken anew.

    Zhao et al. 2024, arXiv 2403.03507. Moments are kept when the basis changes
    and nothing is recovered. `optax.contrib.galore` is this with `scale=1.0`,
    `init="svd"` and `side="long"`, up to the signs of singular vectors, which
    kept moments depend on.

    Args: as in `subtrack`, without those of its tracker and of the recovery.
      init: how leading singular vectors are found, at the start and at every
        refresh: "randomized" compiles to products and QR, "svd" is exact.
      align: whether a new basis is turned towards the old one; see `trackers.svd`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = trackers.svd(init, align)
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


@with_values_as_operands
def golore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 200,
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
    random_after_steps: _Scalar = 5_000,
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore at first, random subspaces when noise rules the gradient.

    He et al. 2024, arXiv 2410.11289. The first moment is projected onto each new
    subspace, the second kept, and nothing recovered.

    Args: as in `galore`, without `align`.
      random_after_steps: steps after which refreshes are random: half of all in the
        paper's pre-training, which the default is for 10,000.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    check_steps("random_after_steps", random_after_steps)
    tracker = switch(trackers.svd(init), trackers.random_jump(), random_after_steps)
    adam = scale_by_projection_aware_adam(
        low_rank,
        b1,
        b2,
        eps,
        mu_dtype,
        transport="momentum",
        moments_dtype=moments_dtype,
    )
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        adam,
        recover_and_scale(low_rank, scale, "none"),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )


@with_values_as_operands
def fira(
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
    align: Align = "none",
    residual: Residual = "exact",
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore, and what it misses, scaled column by column and limited.

    Chen et al. 2024, arXiv 2410.01623.

    Args: as in `galore` and, of the recovery, in `subtrack`.
      residual: "published" recovers what Fira's own code does; see
        `recover_and_scale`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = trackers.svd(init, align)
    adam = scale_by_projection_aware_adam(
        low_rank, b1, b2, eps, mu_dtype, transport=False, moments_dtype=moments_dtype
    )
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        adam,
        recover_and_scale(
            low_rank, scale, "columns", recovery_scale, growth_limit, residual
        ),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )
