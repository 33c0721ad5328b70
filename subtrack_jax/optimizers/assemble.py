"""Assembles the chain of an optimizer from its stages."""

from typing import Any

import jax
import optax

from subtrack_jax._internal.validation import check_factor
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.feed_back import feed_back
from subtrack_jax.stages.monitor import monitor_energy
from subtrack_jax.stages.project import project
from subtrack_jax.stages.slices import chain_in_slices


def assemble(
    low_rank: LowRank,
    first: optax.GradientTransformation,
    rule: optax.GradientTransformation,
    last: optax.GradientTransformation,
    end: tuple[jax.typing.ArrayLike, Any, optax.ScalarOrSchedule],
    monitor: bool = False,
    feedback: tuple[jax.typing.ArrayLike, bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Chains the stages of a method.

    Args:
      low_rank: the `LowRank` of all stages.
      first: the stage that chooses and moves the subspaces.
      rule: computes directions inside of them.
      last: makes updates of the directions.
      end: weight decay, its mask and the learning rate, as in `optax.adamw`.
      monitor: whether `monitor_energy` watches the projection.
      feedback: b1 and `error_feedback` of `feed_back`, for methods that need it.

    Returns:
      The optimizer.

    Raises:
      ValueError: if the decay or the learning rate is out of its range.
    """
    watch = (monitor_energy(low_rank),) if monitor else ()
    before, stages = (first,), (project(low_rank), *watch, rule)
    if feedback is not None:
        inner = optax.chain(*before, *stages)
        before, stages = (feed_back(low_rank, inner, *feedback),), ()
    return chain_in_slices(before, (*stages, last), _decay_and_descend(*end))


def _decay_and_descend(
    weight_decay: jax.typing.ArrayLike, mask: Any, learning_rate: optax.ScalarOrSchedule
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Last transformations of every chain, as in `optax.adamw`."""
    check_factor("weight_decay", weight_decay)
    if not callable(learning_rate):
        check_factor("learning_rate", learning_rate)
    # Without decay, updates need no parameters; the state has the same structure.
    is_zero = isinstance(weight_decay, (int, float)) and weight_decay == 0
    decay = optax.add_decayed_weights(weight_decay, mask)
    if is_zero and mask is None:
        decay = optax.identity()
    return decay, optax.scale_by_learning_rate(learning_rate)
