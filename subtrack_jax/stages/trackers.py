"""Trackers: where a basis starts and how it moves.

A tracker is what differs between the methods of the family. It is a pair of
pure functions on one wide matrix, float32 or float64; `track_subspace` maps
them over batch axes, calls them when a refresh is due, and keeps the old basis
where a gradient or a result is not finite.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from subtrack_jax import grassmann, sharding
from subtrack_jax._internal import products as linear_algebra
from subtrack_jax._internal.loops import cond
from subtrack_jax._internal.validation import check, check_steps
from subtrack_jax.stages.transport import RankOneRotation

Init = Literal["randomized", "svd"]
Align = Literal["none", "sign", "procrustes"]


class Tracker(NamedTuple):
    """How a basis S (m x r) follows the gradients G (m x n) of one matrix.

    Attributes:
      start: (key, gradient, rank) -> basis, for the first step.
      move: (key, gradient, basis) -> (new_basis, rotation), for every later
        refresh. `rotation` is a `RankOneRotation` from the old coordinates to
        the new, or None to have it formed from the two bases.
      needs: what else `move` takes, by name: "count", the steps taken so far;
        "momentum", the bias-corrected first moment (r x n) in the coordinates of
        `basis`, for a chain inside of `feed_back`.
      remember: basis -> memory, for a tracker with a state of its own: a tree of
        arrays, which `move` takes as `memory` and returns anew as a third result.

    Example:
      >>> import subtrack_jax as stj
      >>> frozen = stj.geodesic()._replace(move=lambda key, g, basis: (basis, None))
      >>> low_rank = stj.LowRank(rank=4)
      >>> static_subspace = stj.track_subspace(low_rank, frozen)
    """

    start: Callable[[jax.Array, jax.Array, int], jax.Array]
    move: Callable[..., tuple[Any, ...]]
    needs: tuple[str, ...] = ()
    remember: Callable[[jax.Array], Any] | None = None


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

    def move(key, gradient, basis):
        del key
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
        return grassmann.orthonormalize(turned), RankOneRotation(v, jnp.cos(angle))

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

    def move(key, gradient, basis):
        new_basis = start(key, gradient, basis.shape[-1])
        if align == "sign":
            new_basis = linear_algebra.with_signs_of(new_basis, basis)
        elif align == "procrustes":
            new_basis = grassmann.align(new_basis, basis)
        return new_basis, None

    return Tracker(start, move)


def switch(first: Tracker, then: Tracker, after_steps: jax.typing.ArrayLike) -> Tracker:
    """One tracker for the first steps, another from then on.

    GoLore (He et al. 2024, arXiv 2410.11289) goes over from singular vectors to
    random subspaces, where noise has come to rule the gradient.

    Args:
      first: starts, and moves as long as fewer than `after_steps` steps were taken.
      then: moves afterwards.
      after_steps: from 0 to 2^31 - 1.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if `after_steps` is out of its range, or a tracker has needs of its
        own.

    Example:
      >>> import subtrack_jax as stj
      >>> tracker = stj.switch(stj.svd(), stj.random_jump(), after_steps=5_000)
    """
    check_steps("after_steps", after_steps)
    if first.needs or then.needs or first.remember or then.remember:
        raise ValueError("switch() takes trackers that need gradient and basis alone.")

    def move(key, gradient, basis, *, count):
        def by(tracker):
            def new_basis(key, gradient, basis):
                return tracker.move(key, gradient, basis)[0].astype(basis.dtype)

            return new_basis

        is_first = count < sharding.local(after_steps)
        choices = by(first), by(then)
        return cond(is_first, *choices, key, gradient, basis), None

    return Tracker(first.start, move, needs=("count",))


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

    def move(key, gradient, basis):
        del gradient
        tangent = sharding.local(angle) * grassmann.random_tangent(key, basis)
        new_basis = grassmann.exponential_map(basis, tangent.astype(basis.dtype))
        return grassmann.orthonormalize(new_basis), None

    return Tracker(leading_directions(init), move)


def random_jump() -> Tracker:
    """Draws a fresh random basis at every refresh (GrassJump, arXiv 2510.01878).

    Returns:
      A `Tracker`.
    """

    def start(key, gradient, rank):
        return grassmann.random_basis(key, gradient.shape[0], rank, gradient.dtype)

    def move(key, gradient, basis):
        return start(key, gradient, basis.shape[-1]), None

    return Tracker(start, move)


def leading_directions(init: Init) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The start of most trackers: leading left singular vectors, found as asked."""
    if init not in ("randomized", "svd"):
        raise ValueError(f"init={init!r}: use 'randomized' or 'svd'.")

    if init == "randomized":
        return grassmann.range_finder

    def start(key, gradient, rank):
        leading = jnp.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
        # As in `range_finder`: zero has no leading directions.
        other = grassmann.random_basis(key, gradient.shape[0], rank, gradient.dtype)
        return jnp.where(jnp.any(gradient != 0), leading, other)

    return start
