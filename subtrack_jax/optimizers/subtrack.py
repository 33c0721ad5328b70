"""SubTrack++: a subspace that follows the gradient along Grassmann geodesics.

Rajabi, Nonta & Rambhatla, "SubTrack++: Gradient subspace tracking for scalable LLM
training", NeurIPS 2025, arXiv 2502.01586: the geodesic (equation 5), the transport of
Adam's moments (equations 8 and 9) and the recovery (equations 10 to 12). The workshop
version of 2024 is `subtrack_grad`.

Optimizers are chains of stages. Written out, this is `subtrack`, to the last bit:

  >>> import optax
  >>> import subtrack_jax as stj
  >>> low_rank = stj.LowRank(rank=128)
  >>> optimizer = optax.chain(
  ...     stj.track_subspace(low_rank, stj.geodesic(), update_interval=200),
  ...     stj.project(low_rank),
  ...     stj.scale_by_projection_aware_adam(low_rank, b1=0.9, b2=0.999),
  ...     stj.recover_and_scale(low_rank, scale=0.25, growth_limit=1.01),
  ...     optax.add_decayed_weights(0.1),
  ...     optax.scale_by_learning_rate(1e-3),
  ... )

A new method is a new choice. This one follows the whole tangent where `subtrack`
follows its strongest direction, with Lion inside of the subspace:

  >>> import jax.numpy as jnp
  >>> def steepest(angle):
  ...     def move(gradient, basis, context):
  ...         tangent = stj.grassmann.tangent(basis, gradient)
  ...         length = jnp.linalg.norm(tangent)
  ...         tangent *= angle / jnp.where(length > 0, length, 1)
  ...         return stj.Moved(stj.grassmann.exponential_map(basis, tangent))
  ...     return stj.geodesic()._replace(move=move)
  >>> def steepest_lion(learning_rate, rank, update_interval=50):
  ...     low_rank = stj.LowRank(rank)
  ...     lion = optax.scale_by_lion()
  ...     return optax.chain(
  ...         stj.track_subspace(low_rank, steepest(0.1), update_interval),
  ...         stj.project(low_rank),
  ...         stj.on_coordinates(low_rank, lion, stj.transport_momentum),
  ...         stj.recover_and_scale(low_rank, recovery="none"),
  ...         optax.scale_by_learning_rate(learning_rate),
  ...     )

It trains, in any wrapper of optax and on any mesh:

  >>> import jax
  >>> target = jnp.outer(jnp.arange(16.0), jnp.sin(jnp.arange(64.0)))
  >>> loss = lambda params: jnp.mean((params - target) ** 2)
  >>> optimizer = steepest_lion(1.0, rank=4, update_interval=5)
  >>> params = jnp.zeros_like(target)
  >>> state, start = optimizer.init(params), loss(params)
  >>> step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p))
  >>> for _ in range(100):
  ...     updates, state = step(params, state)
  ...     params = optax.apply_updates(params, updates)
  >>> bool(loss(params) < start / 10)
  True
"""

from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from subtrack_jax import grassmann
from subtrack_jax._internal.products import power_of_two
from subtrack_jax._internal.validation import check
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.method import (
    SharedRecovering,
    SharedTracking,
    low_rank_method,
)
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions
from subtrack_jax.stages.transport import RankOneRotation


def geodesic(
    step_size: jax.typing.ArrayLike | None = None,
    damping: jax.typing.ArrayLike = 1.0,
    init: Init = "randomized",
) -> Tracker:
    """Descends the projection error along a rank-one geodesic (SubTrack++).

    Each refresh turns one direction of the basis towards what the basis misses
    most: the leading singular triple (sigma, u, v) of `grassmann.tangent`.

    Args:
      step_size: None turns by the angle that captures the most energy
        (`grassmann.line_search`). A number eta turns by 2 sigma eta radians, as
        in the paper (arXiv 2502.01586, equation 5); sigma scales with |G|^2, so
        eta has to fit the gradients' scale.
      damping: in (0, 1], multiplies the angle of the line search.
      init: how the first basis is found: "randomized"
        (`grassmann.range_finder`) or "svd".

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if step_size is not None:
        check(
            "step_size", step_size, lambda x: 0 < x < float("inf"), "above 0, or None"
        )
    check("damping", damping, lambda x: 0 < x <= 1, "in (0, 1]")

    def move(gradient, basis, context, *, step_size, damping):
        del context
        scale = power_of_two(gradient)
        tangent = grassmann.tangent(basis, gradient, scale)
        sigma, u, v = grassmann.leading_triple(tangent, basis)
        if step_size is None:
            angle = damping * grassmann.line_search(basis, gradient, u, v)
        else:
            angle = 2 * step_size * scale * scale * sigma
        angle = jnp.asarray(angle, basis.dtype)
        # u is zero: no direction to rotate to, and a rotation would shrink S v.
        angle = jnp.where(sigma > 0, angle, 0)
        turned = grassmann.geodesic(basis, u, v, angle)
        rotation = RankOneRotation(v, jnp.cos(angle))
        return Moved(grassmann.orthonormalize(turned), rotation)

    move = Partial(move, step_size=step_size, damping=damping)
    return Tracker(leading_directions(init), move)


@low_rank_method(transport=True, recovery="columns")
def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    step_size: jax.typing.ArrayLike | None = None,
    damping: jax.typing.ArrayLike = 1.0,
    **shared: Unpack[SharedRecovering],
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: a subspace that follows the gradient, and Adam inside of it.

    Every `update_interval` steps the basis of each matrix turns along the Grassmann
    geodesic that lowers its projection error fastest; Adam's moments turn with it,
    and what the subspace misses is scaled column by column and added back. For a
    matrix with sides m <= n the state holds m r + 2 r n numbers, where Adam's holds
    2 m n.

    Args:
      learning_rate: a number or a schedule.
      init: how the first basis is found: "randomized", or "svd" for an exact
        decomposition, which the TPU compiler takes minutes over.
      step_size: None finds the best angle of each move; a number is the paper's
        eta. See `geodesic`.
      damping: in (0, 1], multiplies the best angle.

    Returns:
      The optimizer; see `adam_in_subspace`.

    Raises:
      ValueError: as `adam_in_subspace`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-2, rank=4, update_interval=10)
      >>> params = {"kernel": jnp.ones((16, 64)), "bias": jnp.ones(64)}
      >>> state = optimizer.init(params)
      >>> grads = jax.grad(lambda p: optax.tree.norm(p, squared=True))(params)
      >>> updates, state = optimizer.update(grads, state, params)
      >>> optax.tree.get(state, "basis")["kernel"].shape
      (16, 4)
      >>> optax.tree.get(state, "mu")["kernel"].shape
      (4, 64)
    """
    tracker = geodesic(step_size, damping, init)
    return adam_in_subspace(learning_rate, tracker, **shared)


@low_rank_method(transport=False, recovery="none")
def subtrack_grad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    step_size: jax.typing.ArrayLike | None = None,
    damping: jax.typing.ArrayLike = 1.0,
    **shared: Unpack[SharedTracking],
) -> optax.GradientTransformationExtraArgs:
    """SubTrack (2024): gradient subspace tracking without the ++.

    The first form of the method: the basis turns as in `subtrack`, while Adam's
    moments stay as they are when it does and what the subspace misses is dropped.

    Args:
      learning_rate: a number or a schedule.
      init: how the first basis is found: "randomized", or "svd" for an exact
        decomposition, which the TPU compiler takes minutes over.
      step_size: None finds the best angle of each move; a number is the paper's
        eta. See `geodesic`.
      damping: in (0, 1], multiplies the best angle.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    tracker = geodesic(step_size, damping, init)
    return adam_in_subspace(learning_rate, tracker, **shared)
