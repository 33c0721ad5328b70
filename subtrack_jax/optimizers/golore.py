"""GoLore: GaLore at first, random subspaces when noise rules the gradient.

He et al. 2024, arXiv 2410.11289.
"""

from typing import Unpack

import jax
import optax

from subtrack_jax._internal.validation import check_steps
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.galore import svd
from subtrack_jax.optimizers.grass import random_jump
from subtrack_jax.optimizers.method import SharedTracking, low_rank_method
from subtrack_jax.stages.tracker import Init, switch


@low_rank_method(transport="momentum", recovery="none")
def golore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    random_after_steps: jax.typing.ArrayLike = 5_000,
    **shared: Unpack[SharedTracking],
) -> optax.GradientTransformationExtraArgs:
    """GoLore: GaLore at first, random subspaces when noise rules the gradient.

    The first moment is projected onto each new subspace, the second kept, and nothing
    recovered.

    Args:
      learning_rate: a number or a schedule.
      init: how leading singular vectors are found, at the start and at every
        refresh: "randomized" compiles to products and QR, "svd" is exact.
      random_after_steps: steps after which refreshes are random: half of all in the
        paper's pre-training, which the default is for 10,000.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    check_steps("random_after_steps", random_after_steps)
    tracker = switch(svd(init), random_jump(), random_after_steps)
    return adam_in_subspace(learning_rate, tracker, **shared)
