"""Monitor: captured energy in the state, for a training loop to read."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from subtrack_jax._internal import placement
from subtrack_jax._internal.trees import Pair, unzip
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_records
from subtrack_jax.stages.record import map_records
from subtrack_jax.stages.stage import stage


class MonitorEnergyState(NamedTuple):
    """State of the monitor: captured energy of the last gradient.

    Attributes:
      captured_energy: |S^T G|^2 / |G|^2 of each matrix, of shape (...); 1 for a
        zero gradient; `optax.MaskedNode` for leaves that are not low-rank.
      gradient_norm: |G| of each matrix, likewise.
    """

    captured_energy: optax.Updates
    gradient_norm: optax.Updates


def monitor_energy(low_rank: LowRank) -> optax.GradientTransformationExtraArgs:
    """Records the captured energy of each gradient in the state.

    Changes no update. It sums squares that the recovery sums anyway, so that in
    one compiled step it costs next to nothing. Inside of `feed_back` the gradient is
    the one with the error added.

    Args:
      low_rank: the same `LowRank` as in the other stages.

    Returns:
      A transformation, to be chained after `project`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-3, rank=4, monitor=True)
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> round(float(optax.tree.get(state, "captured_energy")["kernel"]), 4)
      1.0
    """

    def init_fn(params):
        views = low_rank.views(params)
        return MonitorEnergyState(
            placement.norms_like(params, views), placement.norms_like(params, views)
        )

    def update_fn(updates, state, **extra_args):
        del state, extra_args
        pairs = map_records(
            _measure, lambda _: Pair(optax.MaskedNode(), optax.MaskedNode()), updates
        )
        return updates, MonitorEnergyState(*unzip(pairs))

    return stage(
        init_fn, update_fn, expect_records("monitor_energy", low_rank, "coordinates")
    )


def _measure(record):
    coordinates = record.coordinates
    gradient = record.gradient.astype(coordinates.dtype)
    total = jnp.sum(record.view.column_energy(gradient), axis=-1)
    inside = jnp.sum(jnp.sum(coordinates * coordinates, axis=-2), axis=-1)
    captured = jnp.where(total > 0, inside / jnp.where(total > 0, total, 1), 1)
    return Pair(captured, jnp.sqrt(total))
