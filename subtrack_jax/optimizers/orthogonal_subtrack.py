"""SubTrack with orthogonalised directions: Muon's step after Adam's, in the subspace.

A method of this library, not of a paper: subspace and moments as in SubTrack++ (arXiv
2502.01586), and the Newton-Schulz iteration of Muon (Jordan et al. 2024) on Adam's
direction, where SUMO (arXiv 2505.24749) takes an exact SVD of the first moment.
"""

from typing import Unpack

import jax
import optax

from subtrack_jax._internal.products import dot, root
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.method import SharedTracking, low_rank_method
from subtrack_jax.optimizers.subtrack import geodesic
from subtrack_jax.stages.tracker import Init

# Singular values from 0.01 to 1 come out between 0.68 and 1.14 after five steps.
_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5


@low_rank_method(transport=True, recovery="none")
def orthogonal_subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    **shared: Unpack[SharedTracking],
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++ that follows all directions of its subspace at nearly one rate.

    The singular values of Adam's direction are brought near one, and its entries back
    to the size that they have in Adam. Nothing is recovered.

    Args:
      learning_rate: a number or a schedule.
      init: how the first basis is found; see `subtrack`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    tracker = geodesic(init=init)
    return adam_in_subspace(learning_rate, tracker, refine=_orthogonal, **shared)


def _orthogonal(x: jax.Array) -> jax.Array:
    norm = root((x * x).sum((-2, -1), keepdims=True))
    x = x / jax.numpy.where(norm > 0, norm, 1)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = dot(x, x.mT)
        x = a * x + dot(b * gram + c * dot(gram, gram), x)
    return x * x.shape[-1] ** 0.5
