"""LDAdam: a power iteration on every step, and nothing dropped for good.

Robert et al. 2024, arXiv 2410.16103, algorithm 1.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from subtrack_jax._internal.orthonormal import orthonormal_columns
from subtrack_jax._internal.products import dot, power_of_two
from subtrack_jax._internal.validation import check_decay
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.method import SharedTracking, low_rank_method
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions


def power_iteration(
    rho: jax.typing.ArrayLike = 0.908, init: Init = "randomized"
) -> Tracker:
    """One power iteration on momentum and gradient together (LDAdam).

    The new basis spans B B^T S for B = rho S m^ + (1 - rho) G, with the
    bias-corrected first moment m^ in the coordinates of S (Robert et al. 2024, arXiv
    2410.16103, algorithm 1). With B^T S = rho m^T + (1 - rho) G^T S that takes two
    products of the size of a projection. The chain up to the inner rule has to be
    inside of `feed_back`.

    Args:
      rho: in [0, 1), weight of the momentum.
      init: how the first basis is found, as in `geodesic`.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_decay("rho", rho, 0.908)

    def move(gradient, basis, context, *, rho):
        momentum = context.momentum
        weight = jnp.asarray(rho, basis.dtype)
        # Ignore a momentum that is not finite.
        is_usable = jnp.all(jnp.isfinite(momentum))
        momentum = jnp.where(is_usable, momentum, 0).astype(basis.dtype)
        # Second powers of tiny numbers would leave float32's range.
        scale = jnp.maximum(power_of_two(gradient), power_of_two(momentum))
        gradient, momentum = gradient / scale, momentum / scale
        image = weight * momentum.T + (1 - weight) * (gradient.T @ basis)
        product = weight * dot(basis, momentum @ image)
        product += (1 - weight) * dot(gradient, image)
        new_basis = orthonormal_columns(product)
        # QR of zeros is arbitrary: keep the old basis.
        return Moved(jnp.where(jnp.any(product != 0), new_basis, basis))

    move = Partial(move, rho=rho)
    return Tracker(leading_directions(init), move, needs_momentum=True)


@low_rank_method(
    transport=True,
    recovery="none",
    update_interval=1,
    b1=0.908,
    b2=0.99,
    scale=1.0,
)
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    rho: jax.typing.ArrayLike = 0.908,
    error_feedback: bool = True,
    **shared: Unpack[SharedTracking],
) -> optax.GradientTransformationExtraArgs:
    """LDAdam: a power iteration on every step, and nothing dropped for good.

    The subspace follows momentum and gradient, moments are transported, and what a
    step misses is added to the next gradient. That takes two more products of the size
    of a projection on every step, with error feedback four, and a buffer of the
    parameter's size: it saves Adam's second moment.

    Args:
      learning_rate: a number or a schedule.
      update_interval: steps between two power iterations; 1 in the paper.
      init: how the first basis is found; see `subtrack`.
      rho: in [0, 1), weight of the momentum in what the power iteration looks at.
      error_feedback: whether what a step misses is kept for the next, and seen by
        `monitor`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    tracker = power_iteration(rho, init)
    return adam_in_subspace(
        learning_rate, tracker, error_feedback=error_feedback, **shared
    )
