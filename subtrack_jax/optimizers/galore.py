"""GaLore: leading singular vectors of the gradient, recomputed at every refresh.

Zhao et al. 2024, arXiv 2403.03507, algorithm 2.
"""

from typing import Literal, Unpack

import optax

from subtrack_jax import grassmann
from subtrack_jax._internal.products import with_signs_of
from subtrack_jax.optimizers.adam_in_subspace import adam_in_subspace
from subtrack_jax.optimizers.method import SharedTracking, low_rank_method
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions

Align = Literal["none", "sign", "procrustes"]


def svd(init: Init = "svd", align: Align = "none") -> Tracker:
    """Recomputes the leading left singular vectors at every refresh (GaLore).

    Signs of singular vectors are arbitrary, and so is their order where singular
    values are close. Moments that are kept across a refresh then belong to other
    directions; aligning the new basis with the old one gives each its own again as
    far as it still has one. The subspace is the same either way.

    Args:
      init: "svd" for the exact decomposition, "randomized" for
        `grassmann.range_finder`, at the start and at every refresh.
      align: "none" as the published code does; "sign" flips each new vector that
        points away from its predecessor; "procrustes" turns the new basis within
        its span to be as near the old one as it can (`grassmann.align`).

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is not one of its choices.
    """
    start = leading_directions(init)
    if align not in ("none", "sign", "procrustes"):
        raise ValueError(f"align={align!r}: use 'none', 'sign' or 'procrustes'.")

    def move(gradient, basis, context):
        new_basis = start(context.key, gradient, basis.shape[-1])
        if align == "sign":
            new_basis = with_signs_of(new_basis, basis)
        elif align == "procrustes":
            new_basis = grassmann.align(new_basis, basis)
        return Moved(new_basis)

    return Tracker(start, move)


@low_rank_method(transport=False, recovery="none")
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    init: Init = "randomized",
    align: Align = "none",
    **shared: Unpack[SharedTracking],
) -> optax.GradientTransformationExtraArgs:
    """GaLore: the leading singular subspace of the gradient, recomputed at a refresh.

    Moments are kept when the basis changes and nothing is recovered.
    `optax.contrib.galore` is this with `scale=1.0`, `init="svd"` and `side="long"`,
    up to the signs of singular vectors, which kept moments depend on.

    Args:
      learning_rate: a number or a schedule.
      init: how leading singular vectors are found, at the start and at every
        refresh: "randomized" compiles to products and QR, "svd" is exact.
      align: whether a new basis is turned towards the old one; see `svd`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `adam_in_subspace`.
    """
    return adam_in_subspace(learning_rate, svd(init, align), **shared)
