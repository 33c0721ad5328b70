"""Random projections regenerated from a seed (APOLLO)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from subtrack_jax._internal.trees import state_dtype
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_state
from subtrack_jax.stages.record import LowRankLeaf
from subtrack_jax.stages.stage import stage
from subtrack_jax.stages.track import check_schedule, expect_plain

Draw = Callable[[jax.Array, int, int, jax.typing.DTypeLike], jax.Array]


class DrawProjectionState(NamedTuple):
    """State of `draw_projection`: the step count, which seeds the projections.

    Attributes:
      count: steps taken so far; scalar int32.
    """

    count: jax.Array  # type: ignore[assignment]  # also a method of tuples


def gaussian(
    key: jax.Array, m: int, rank: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Gaussian projection: preserves lengths on average, columns not orthonormal.

    Args:
      key: a PRNG key.
      m: rows, the dimension of the space.
      rank: columns.
      dtype: float32 or float64.

    Returns:
      Normal numbers of variance 1 / rank, of shape (m, rank).
    """
    return jax.random.normal(key, (m, rank), dtype) / rank**0.5


def draw_projection(
    low_rank: LowRank,
    update_interval: jax.typing.ArrayLike = 200,
    seed: jax.typing.ArrayLike = 0,
    draw: Draw = gaussian,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each low-rank gradient by a record with a random projection as basis.

    The projection is drawn anew from a seed on every step, the same for
    `update_interval` steps and for all matrices of a shape (why, see `seed` of
    `track_subspace`): nothing of it is kept in the state (APOLLO, Zhu et al.
    2024, arXiv 2412.05270, algorithm 1). Because it need not be orthonormal, it takes
    a stage after it that looks at lengths alone: `scale_gradient`. Moments in its
    coordinates cannot follow it.

    Args:
      low_rank: which leaves are projected, on which side and to which rank.
      update_interval: steps between two projections, at least 1.
      seed: seed of the projections, which depend on it, the step and the shape of a
        matrix alone.
      draw: (key, m, rank, dtype) -> projection of shape (m, rank).

    Returns:
      A transformation whose updates are for `project`. Other leaves pass.

    Raises:
      ValueError: if `update_interval` is below 1.

    Example:
      >>> import optax
      >>> import subtrack_jax as stj
      >>> low_rank = stj.LowRank(rank=1)
      >>> apollo_with_lion = optax.chain(
      ...     stj.draw_projection(low_rank),
      ...     stj.project(low_rank),
      ...     stj.on_coordinates(low_rank, optax.scale_by_lion()),
      ...     stj.scale_gradient(low_rank, per="matrix"),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
    """
    check_schedule(update_interval, seed)

    def init_fn(params):
        low_rank.check(params)
        return DrawProjectionState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, *, update_interval, seed, **extra_args):
        del extra_args
        expect_state("draw_projection", DrawProjectionState, state)
        drawn_at = state.count - state.count % update_interval
        key = jax.random.fold_in(jax.random.key(seed), drawn_at)

        def record(gradient, view):
            if view is None:
                return gradient
            *batch, m, rank = view.basis_shape
            projection = draw(key, m, rank, state_dtype(gradient.dtype))
            basis = jnp.broadcast_to(projection, (*batch, m, rank))
            return LowRankLeaf.start(gradient, view, basis, basis, jnp.zeros([], bool))

        records = jax.tree.map(record, updates, low_rank.views(updates))
        return records, DrawProjectionState(optax.safe_increment(state.count))

    return stage(
        init_fn,
        Partial(update_fn, update_interval=update_interval, seed=seed),
        expect_plain("draw_projection"),
        jitted=False,
    )
