"""What the chains of all members of the family have in common."""

from typing import Any

import jax
import optax

from subtrack_jax._validation import check
from subtrack_jax.coordinates import project
from subtrack_jax.low_rank import LowRank
from subtrack_jax.monitoring import monitor_energy


def assemble(
    low_rank: LowRank,
    track: optax.GradientTransformation,
    adam: optax.GradientTransformation,
    recover: optax.GradientTransformation,
    end: tuple[jax.typing.ArrayLike, Any, optax.ScalarOrSchedule],
    monitor: bool,
) -> optax.GradientTransformationExtraArgs:
    """Chains the stages of a method.

    Args:
      low_rank: that of all stages.
      track: chooses and moves the subspaces.
      adam: the rule inside of them.
      recover: lifts its answer.
      end: weight decay, its mask and the learning rate, as in `optax.adamw`.
      monitor: whether `monitor_energy` watches the projection.

    Returns:
      The optimizer.

    Raises:
      ValueError: if the decay or the learning rate is out of its range.
    """
    watch = (monitor_energy(low_rank),) if monitor else ()
    return optax.chain(
        track, project(low_rank), *watch, adam, recover, *_decay_and_descend(*end)
    )


def _decay_and_descend(
    weight_decay: jax.typing.ArrayLike, mask: Any, learning_rate: optax.ScalarOrSchedule
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """The end of every chain, as in `optax.adamw`."""
    finite = lambda x: 0 <= x < float("inf")
    check("weight_decay", weight_decay, finite, "a finite number, 0 or above")
    if not callable(learning_rate):
        check("learning_rate", learning_rate, finite, "a finite number, 0 or above")
    # Without decay, updates need no parameters; the state is the same either way.
    is_zero = isinstance(weight_decay, (int, float)) and weight_decay == 0
    decay = optax.add_decayed_weights(weight_decay, mask)
    if is_zero and mask is None:
        decay = optax.identity()
    return decay, optax.scale_by_learning_rate(learning_rate)
