"""Fira: GaLore that recovers what its subspace misses.

Chen et al. 2024, arXiv 2410.01623, section 3: norm-based scaling of the residual, and
the limiter of its growth.
"""

from typing import Unpack

import optax

from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.galore import Align, svd
from subtrack_jax.optimizers.method import SharedRecovering, low_rank_method
from subtrack_jax.stages.recover import Residual
from subtrack_jax.stages.tracker import Init


@low_rank_method(transport=False, recovery="columns")
def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    align: Align = "none",
    residual: Residual = "exact",
    **shared: Unpack[SharedRecovering],
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the scaled residual, with limited growth.

    Args:
      learning_rate: a number or a schedule.
      init: how leading singular vectors are found, at the start and at every
        refresh: "randomized" compiles to products and QR, "svd" is exact.
      align: whether a new basis is turned towards the old one; see `svd`.
      residual: "published" recovers what Fira's own code does; see
        `recover_and_scale`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    return adam_in_subspace(
        learning_rate, svd(init, align), residual=residual, **shared
    )
