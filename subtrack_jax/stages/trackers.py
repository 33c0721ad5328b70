"""Trackers of the methods that change their subspaces at intervals."""

from typing import Literal

import jax
import jax.numpy as jnp

from subtrack_jax import grassmann, sharding
from subtrack_jax._internal import products as linear_algebra
from subtrack_jax._internal.validation import check
from subtrack_jax.stages.tracker import Init, Moved, Tracker, leading_directions
from subtrack_jax.stages.transport import RankOneRotation

Align = Literal["none", "sign", "procrustes"]


def geodesic(
    step_size: jax.typing.ArrayLike | None = None,
    damping: jax.typing.ArrayLike = 1.0,
    init: Init = "randomized",
) -> Tracker:
    """Descends the projection error along a rank-one geodesic (SubTrack++).

    Each refresh turns one direction of the basis towards what the basis misses
    most: the leading singular triple (sigma, u, v) of `grassmann.tangent`.

    Args:
      step_size: None turns by the angle that captures the most energy
        (`grassmann.line_search`). A number eta turns by 2 sigma eta radians, as
        in the paper (arXiv 2502.01586, equation 5); sigma scales with |G|^2, so
        eta has to fit the gradients' scale.
      damping: in (0, 1], multiplies the angle of the line search.
      init: how the first basis is found: "randomized"
        (`grassmann.range_finder`) or "svd".

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is out of its range.
    """
    if step_size is not None:
        check(
            "step_size", step_size, lambda x: 0 < x < float("inf"), "above 0, or None"
        )
    check("damping", damping, lambda x: 0 < x <= 1, "in (0, 1]")

    def move(gradient, basis, context):
        del context
        scale = linear_algebra.power_of_two(gradient)
        tangent = grassmann.tangent(basis, gradient, scale)
        sigma, u, v = grassmann.leading_triple(tangent, basis)
        if step_size is None:
            angle = sharding.local(damping) * grassmann.line_search(
                basis, gradient, u, v
            )
        else:
            angle = 2 * sharding.local(step_size) * scale * scale * sigma
        angle = jnp.asarray(angle, basis.dtype)
        # Nothing to turn towards: u is zero, and a turn would shrink S v.
        angle = jnp.where(sigma > 0, angle, 0)
        turned = grassmann.geodesic(basis, u, v, angle)
        rotation = RankOneRotation(v, jnp.cos(angle))
        return Moved(grassmann.orthonormalize(turned), rotation)

    return Tracker(leading_directions(init), move)


def svd(init: Init = "svd", align: Align = "none") -> Tracker:
    """Takes the leading left singular vectors anew at every refresh (GaLore).

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
            new_basis = linear_algebra.with_signs_of(new_basis, basis)
        elif align == "procrustes":
            new_basis = grassmann.align(new_basis, basis)
        return Moved(new_basis)

    return Tracker(start, move)


def random_walk(
    angle: jax.typing.ArrayLike = 0.1, init: Init = "randomized"
) -> Tracker:
    """Walks along a random geodesic (GrassWalk, arXiv 2510.01878).

    Args:
      angle: largest principal angle between consecutive bases, in radians, in
        (0, pi/2].
      init: how the first basis is found, as in `geodesic`.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check("angle", angle, lambda x: 0 < x <= 1.5708, "in (0, pi/2] radians")

    def move(gradient, basis, context):
        del gradient
        tangent = grassmann.random_tangent(context.key, basis)
        tangent = sharding.local(angle) * tangent
        new_basis = grassmann.exponential_map(basis, tangent.astype(basis.dtype))
        return Moved(grassmann.orthonormalize(new_basis))

    return Tracker(leading_directions(init), move)


def random_jump() -> Tracker:
    """Draws a fresh random basis at every refresh (GrassJump, arXiv 2510.01878).

    Returns:
      A `Tracker`.
    """

    def start(key, gradient, rank):
        return grassmann.random_basis(key, gradient.shape[0], rank, gradient.dtype)

    def move(gradient, basis, context):
        return Moved(start(context.key, gradient, basis.shape[-1]))

    return Tracker(start, move)
