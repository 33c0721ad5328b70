"""Tracker protocol: how a subspace starts and how it follows the gradients.

A tracker is what differs between the methods of the family: pure functions on one
wide matrix, float32 or float64. `track_subspace` maps them over batch axes, calls
them when a refresh is due, and keeps the old basis where a gradient or a result is
not finite.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from subtrack_jax import grassmann
from subtrack_jax._internal.loops import cond
from subtrack_jax._internal.validation import check_steps
from subtrack_jax.stages.transport import RankOneRotation

Init = Literal["randomized", "svd"]
Start = Callable[[jax.Array, jax.Array, int], jax.Array]


class TrackerContext(NamedTuple):
    """What a tracker may look at beside the gradient and the basis of a matrix.

    Attributes:
      key: PRNG key of this step, the same for all matrices.
      count: steps taken so far; scalar int32.
      momentum: the bias-corrected first moment (r x n) in the coordinates of the
        basis; None unless the tracker has `needs_momentum`.
      memory: the tracker's own state for this matrix.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]  # also a method of tuples
    momentum: jax.Array | None = None
    memory: Any = ()


class Moved(NamedTuple):
    """The new basis of a matrix, and what comes with it.

    Attributes:
      basis: S_t, of shape (m, r).
      rotation: `RankOneRotation` from the old coordinates to the new, where the
        tracker knows one; None to have it formed from the two bases.
      memory: the tracker's state from here on, of the structure that it had.
    """

    basis: jax.Array
    rotation: RankOneRotation | None = None
    memory: Any = ()


def no_memory(basis: jax.Array) -> tuple[()]:
    """The memory of a tracker without a state of its own."""
    del basis
    return ()


class Tracker(NamedTuple):
    """How a basis S (m x r) follows the gradients G (m x n) of one matrix.

    Attributes:
      start: (key, gradient, rank) -> basis, for the first step.
      move: (gradient, basis, context) -> `Moved`, for every later refresh; the
        context is a `TrackerContext`. Bind hyper-parameters that
        `optax.inject_hyperparams` may make arrays with `jax.tree_util.Partial`:
        the stage then finds them and reshards them to its mesh.
      memory: basis -> a tree of arrays, for a tracker with a state of its own, which
        `move` finds in the context and returns anew.
      needs_momentum: whether `move` looks at `context.momentum`, for which the chain
        has to be inside `feed_back`.

    Example:
      >>> import subtrack_jax as stj
      >>> stay = lambda gradient, basis, context: stj.Moved(basis)
      >>> frozen = stj.geodesic()._replace(move=stay)
      >>> low_rank = stj.LowRank(rank=4)
      >>> static_subspace = stj.track_subspace(low_rank, frozen)
    """

    start: Start
    move: Callable[[jax.Array, jax.Array, TrackerContext], Moved]
    memory: Callable[[jax.Array], Any] = no_memory
    needs_momentum: bool = False


def switch(first: Tracker, then: Tracker, after_steps: jax.typing.ArrayLike) -> Tracker:
    """One tracker for the first steps, another from then on.

    GoLore (He et al. 2024, arXiv 2410.11289) goes over from singular vectors to
    random subspaces, where noise has come to rule the gradient.

    Args:
      first: starts, and moves as long as fewer than `after_steps` steps were taken.
      then: moves afterwards. Its memory, if it has one, is what it starts with until
        then.
      after_steps: from 0 to 2^31 - 1.

    Returns:
      A `Tracker`.

    Raises:
      ValueError: if `after_steps` is out of its range.

    Example:
      >>> import subtrack_jax as stj
      >>> tracker = stj.switch(stj.svd(), stj.random_jump(), after_steps=5_000)
    """
    check_steps("after_steps", after_steps)

    def memory(basis):
        both = first.memory(basis), then.memory(basis)
        return both if jax.tree.leaves(both) else ()

    def move(gradient, basis, context, *, trackers, after_steps):
        def by(which):
            def branch(gradient, basis, context):
                memories = list(context.memory or ((), ()))
                own = context._replace(memory=memories[which])
                # Without a rotation: both branches have to return one kind.
                new_basis, _, memories[which] = trackers[which].move(
                    gradient, basis, own
                )
                new_memory = tuple(memories) if context.memory else ()
                return _in_dtypes_of((basis, context.memory), (new_basis, new_memory))

            return branch

        is_first = context.count < after_steps
        new_basis, new_memory = cond(is_first, by(0), by(1), gradient, basis, context)
        return Moved(new_basis, memory=new_memory)

    needs_momentum = first.needs_momentum or then.needs_momentum
    move = Partial(move, trackers=(first, then), after_steps=after_steps)
    return Tracker(first.start, move, memory, needs_momentum)


def _in_dtypes_of(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda old, new: new.astype(old.dtype), old, new)


def leading_directions(init: Init) -> Start:
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
