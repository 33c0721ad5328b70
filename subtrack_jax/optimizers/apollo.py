"""APOLLO: the gradient, scaled as Adam scales a random projection of it.

Zhu et al. 2024, arXiv 2412.05270, algorithm 1.
"""

from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from subtrack_jax._internal.validation import check_factor
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.assemble import assemble
from subtrack_jax.optimizers.method import Shared, low_rank_method
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.draw_projection import draw_projection
from subtrack_jax.stages.recover import scale_gradient


@low_rank_method(scale=1.0)
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    growth_limit: jax.typing.ArrayLike | None = 1.01,
    per: Literal["columns", "matrix"] = "columns",
    **shared: Unpack[Shared],
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: the gradient, scaled as Adam scales a random projection of it.

    No basis is kept: a projection is drawn from the seed on every step, another one
    every `update_interval` steps, when moments stay as they are. The state holds 2 r n
    numbers, and updates have full rank.

    Args:
      learning_rate: a number or a schedule.
      update_interval: steps between two projections.
      scale: alpha; the update is multiplied by its root, as in the paper.
      growth_limit: the update may grow by this factor a step; None for no limit.
      seed: seed of the projections; see `draw_projection`.
      per: "columns" of the matrix have a factor each, or a "matrix" one alone.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    low_rank = LowRank(shared["rank"], shared["dimension_numbers"], shared["side"])
    scale = shared["scale"]
    check_factor("scale", scale)
    root = scale**0.5 if isinstance(scale, (int, float)) else jnp.sqrt(scale)
    adam = scale_by_projection_aware_adam(
        low_rank,
        shared["b1"],
        shared["b2"],
        shared["eps"],
        shared["mu_dtype"],
        transport=False,
        moments_dtype=shared["moments_dtype"],
    )
    return assemble(
        low_rank,
        draw_projection(low_rank, shared["update_interval"], shared["seed"]),
        adam,
        scale_gradient(low_rank, root, per, growth_limit),
        end=(shared["weight_decay"], shared["mask"], learning_rate),
    )


@low_rank_method(rank=1, scale=128.0)
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    growth_limit: jax.typing.ArrayLike | None = 1.01,
    per: Literal["columns", "matrix"] = "matrix",
    **shared: Unpack[Shared],
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: `apollo` with one direction and one factor for each matrix.

    The state holds 2 n numbers for an m x n matrix, hardly more than that of SGD.

    Args:
      learning_rate: a number or a schedule.
      update_interval: steps between two projections.
      scale: alpha; the update is multiplied by its root, as in the paper.
      growth_limit: the update may grow by this factor a step; None for no limit.
      seed: seed of the projections; see `draw_projection`.
      per: "columns" of the matrix have a factor each, or a "matrix" one alone.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    return apollo(learning_rate, growth_limit=growth_limit, per=per, **shared)
