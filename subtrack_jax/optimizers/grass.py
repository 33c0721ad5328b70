"""GrassWalk and GrassJump: random subspaces in place of tracked ones.

Rajabi et al. 2025, arXiv 2510.01878. Moments and recovery are as in `subtrack`.
"""

from typing import Unpack

import jax
import optax
from jax.tree_util import Partial

from subtrack_jax import grassmann
from subtrack_jax._internal.validation import check
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.method import SharedRecovering, low_rank_method
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions


def random_walk(
    angle: jax.typing.ArrayLike = 0.1, init: Init = "randomized"
) -> Tracker:
    """Walks along a random geodesic (GrassWalk).

    Args:
      angle: largest principal angle between consecutive bases, in radians, in
        (0, pi/2].
      init: how the first basis is found, as in `geodesic`.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check("angle", angle, lambda x: 0 < x <= 1.5708, "in (0, pi/2] radians")

    def move(gradient, basis, context, *, angle):
        del gradient
        tangent = angle * grassmann.random_tangent(context.key, basis)
        new_basis = grassmann.exponential_map(basis, tangent.astype(basis.dtype))
        return Moved(grassmann.orthonormalize(new_basis))

    return Tracker(leading_directions(init), Partial(move, angle=angle))


def random_jump() -> Tracker:
    """Draws a fresh random basis at every refresh (GrassJump).

    Returns:
      A `Tracker`.
    """

    def start(key, gradient, rank):
        return grassmann.random_basis(key, gradient.shape[0], rank, gradient.dtype)

    def move(gradient, basis, context):
        return Moved(start(context.key, gradient, basis.shape[-1]))

    return Tracker(start, move)


@low_rank_method(transport=True, recovery="columns")
def grass_walk(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    angle: jax.typing.ArrayLike = 0.1,
    **shared: Unpack[SharedRecovering],
) -> optax.GradientTransformationExtraArgs:
    """GrassWalk: a random walk on the Grassmannian in place of tracking.

    Each refresh follows a random geodesic.

    Args:
      learning_rate: a number or a schedule.
      init: how the first basis is found; see `subtrack`.
      angle: largest principal angle between consecutive bases, in radians.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    return adam_in_subspace(learning_rate, random_walk(angle, init), **shared)


@low_rank_method(transport=True, recovery="columns")
def grass_jump(
    learning_rate: optax.ScalarOrSchedule,
    **shared: Unpack[SharedRecovering],
) -> optax.GradientTransformationExtraArgs:
    """GrassJump: a fresh random subspace at every refresh.

    The gradient is never looked at to choose a basis.

    Args:
      learning_rate: a number or a schedule.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    return adam_in_subspace(learning_rate, random_jump(), **shared)
