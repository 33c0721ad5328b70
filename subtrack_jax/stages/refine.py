"""Change of the inner rule's directions before they are lifted."""

from collections.abc import Callable

import jax
import optax

from subtrack_jax._internal import placement
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_records
from subtrack_jax.stages.record import LowRankLeaf, map_records
from subtrack_jax.stages.stage import stage

Refine = Callable[[jax.Array], jax.Array]


def refine_directions(
    low_rank: LowRank, refine: Refine
) -> optax.GradientTransformationExtraArgs:
    """Applies a function to the directions N of all low-rank leaves.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      refine: from directions (..., r, n) to directions of the same shape.

    Returns:
      A stateless transformation, to be chained after the inner rule.
    """

    @jax.jit
    def refined(record: LowRankLeaf) -> jax.Array:
        return refine(placement.unsplit_rank(record.direction))

    def update_fn(updates, state, **extra_args):
        del extra_args
        return map_records(
            lambda record: record.replace(direction=record.map(refined)),
            lambda g: g,
            updates,
        ), state

    return stage(
        optax.init_empty_state,
        update_fn,
        expect_records("refine_directions", low_rank, "direction"),
    )
