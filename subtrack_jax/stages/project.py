"""Projection of gradients into the subspace: coordinates A = S^T G."""

import jax
import optax

from subtrack_jax._internal import placement
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_records
from subtrack_jax.stages.record import LowRankLeaf, map_records
from subtrack_jax.stages.stage import stage


def project(low_rank: LowRank) -> optax.GradientTransformationExtraArgs:
    """Projects every low-rank gradient to its coordinates A = S^T G.

    Args:
      low_rank: the same `LowRank` as in the other stages.

    Returns:
      A stateless transformation, to be chained after `track_subspace`. Products
      accumulate in the basis' dtype, float32 at least. Gradients, and with them the
      updates, leave in the wider of their own dtype and the parameter's, if `update`
      is given the parameters.
    """

    def update_fn(updates, state, **extra_args):
        del extra_args
        return map_records(
            lambda record: record.replace(coordinates=record.map(_coordinates)),
            lambda g: g,
            updates,
        ), state

    return stage(
        optax.init_empty_state,
        update_fn,
        expect_records("project", low_rank, "basis"),
        widens=True,
    )


# Jitted, so that equal leaves are traced once.
@jax.jit
def _coordinates(record: LowRankLeaf) -> jax.Array:
    basis = placement.replicated_basis(record.basis, record.view)
    return placement.unsplit_rank(record.view.project(basis, record.gradient))
