"""Subspace tracking, the first stage: a basis for every low-rank gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from subtrack_jax._internal import placement
from subtrack_jax._internal.loops import apply_if
from subtrack_jax._internal.matrix_loops import Stack, map_matrices, result_shapes
from subtrack_jax._internal.trees import map_leaves, state_dtype
from subtrack_jax._internal.validation import check, check_steps
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_rule_state, expect_shapes, expect_state
from subtrack_jax.stages.record import LowRankLeaf, is_record
from subtrack_jax.stages.stage import stage
from subtrack_jax.stages.tracker import Moved, Tracker, TrackerContext
from subtrack_jax.stages.transport import RankOneRotation


class TrackSubspaceState(NamedTuple):
    """State of `track_subspace`: bases of low-rank leaves, step count.

    Attributes:
      count: steps taken so far; scalar int32.
      basis: S for each low-rank leaf, of shape (..., m, r), orthonormal;
        `optax.MaskedNode` for other leaves.
      memory: what the tracker keeps for each low-rank leaf, batch axes first: an
        empty tuple for most.
    """

    count: jax.Array  # type: ignore[assignment]  # also a method of tuples
    basis: optax.Updates
    memory: Any


def track_subspace(
    low_rank: LowRank,
    tracker: Tracker,
    update_interval: jax.typing.ArrayLike = 200,
    seed: jax.typing.ArrayLike = 0,
    basis_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces each low-rank gradient by a record that carries its basis.

    The basis starts from the first gradient, moves on every step whose number
    is a multiple of `update_interval`, and keeps still otherwise. A gradient
    with a NaN or an infinity never moves its basis.

    Args:
      low_rank: which leaves have a basis, where and of which rank.
      tracker: how a basis starts and moves.
      update_interval: steps between moves, from 1 to 2^31 - 1.
      seed: seed of the tracker's random numbers, an int of 32 bits. They depend on it,
        the step and the matrix' shape alone: all matrices of a shape share one
        draw. A stacked leaf, its slices in leaves of their own, the same leaves in
        another tree, and each leaf updated by itself therefore evolve alike, which
        draws by path or by position would not. Give leaves optimizers with other
        seeds (`optax.partition`) where shared random bases are not wanted.
      basis_dtype: dtype in which bases are stored; None for the parameter's,
        float32 at least, in which they are computed in any case. bfloat16 keeps
        a basis orthonormal to about 1e-2 only.

    Returns:
      A transformation whose updates are for `project`. Other leaves pass.

    Raises:
      ValueError: if `update_interval` or `seed` is out of its range; on `init`, if
        no leaf matches.
    """
    check_schedule(update_interval, seed)

    def new_memory(basis):
        memory = tracker.memory
        for _ in basis.shape[:-2]:
            memory = jax.vmap(memory)
        return memory(basis)

    def init_fn(params):
        low_rank.check(params)
        views = low_rank.views(params)
        empty = lambda _: optax.MaskedNode()

        def basis_of(leaf, view):
            dtype = jnp.dtype(basis_dtype or state_dtype(leaf.dtype))
            return placement.basis_like(leaf, view, dtype)

        def memory_of(leaf, view):
            dtype = state_dtype(leaf.dtype)
            return new_memory(placement.basis_like(leaf, view, dtype))

        return TrackSubspaceState(
            count=jnp.zeros([], jnp.int32),
            basis=map_leaves(basis_of, empty, params, views),
            memory=map_leaves(memory_of, empty, params, views),
        )

    def update_fn(
        updates, state, momentum=None, *, tracker, update_interval, seed, **extra_args
    ):
        del extra_args
        if tracker.needs_momentum and momentum is None:
            raise TypeError(
                "track_subspace was given a tracker that needs momentum, and none: put"
                " the chain up to its inner rule inside of feed_back."
            )
        expect_state("track_subspace", TrackSubspaceState, state)
        views = low_rank.views(updates)
        basis_shape = lambda view: view.basis_shape
        expect_shapes(
            "track_subspace", "basis", state.basis, updates, views, basis_shape
        )
        leaves, structure = jax.tree.flatten(updates)
        views = structure.flatten_up_to(views)
        chosen = [k for k, view in enumerate(views) if view is not None]

        def of_chosen(tree):
            entries = structure.flatten_up_to(tree)
            return [entries[k] for k in chosen]

        stored = of_chosen(state.basis)
        memories = of_chosen(state.memory)
        bases = [basis.astype(state_dtype(basis.dtype)) for basis in stored]
        expected = jax.eval_shape(lambda bases: list(map(new_memory, bases)), bases)
        expect_rule_state("track_subspace", memories, expected)
        momenta: list[Any] = [None] * len(chosen)
        if tracker.needs_momentum:
            momenta = of_chosen(momentum)
        key = jax.random.fold_in(jax.random.key(seed), state.count)

        def start(gradient, basis, context):
            first = tracker.start(key, gradient, basis.shape[-1])
            return Moved(first, memory=context.memory)

        def refresh(how, gradient, basis, memory, momentum):
            context = TrackerContext(key, state.count, momentum, memory)
            return _moved_if_finite(how, gradient, basis, context)

        def stacks(tracked):
            return [
                Stack(views[k], leaves[k], (old.basis, old.memory, extra))
                for k, old, extra in zip(chosen, tracked, momenta, strict=True)
            ]

        begin, move = (functools.partial(refresh, how) for how in (start, tracker.move))
        is_start = state.count == 0
        moved = ~is_start & (state.count % update_interval == 0)
        # One predicate for the full tree, outside of any vmap, which would make a
        # select of it and pay for a refresh on every step.
        started = apply_if(
            is_start,
            lambda tracked: map_matrices(begin, stacks(tracked)),
            [
                Moved(basis, memory=memory)
                for basis, memory in zip(bases, memories, strict=True)
            ],
            "start_subspaces",
        )
        # A loop's carry has one structure: start with the kind of rotation of moves.
        kinds = result_shapes(move, stacks(started))
        tracked = [
            old
            if kind.rotation is None
            else old._replace(rotation=RankOneRotation.identity(old.basis))
            for old, kind in zip(started, kinds, strict=True)
        ]
        tracked = apply_if(
            moved,
            lambda tracked: map_matrices(move, stacks(tracked)),
            tracked,
            "move_subspaces",
        )
        new_updates, new_bases = list(leaves), [optax.MaskedNode()] * len(leaves)
        new_memories = list(new_bases)
        for j, k in enumerate(chosen):
            new, new_memories[k] = tracked[j].basis, tracked[j].memory
            new_bases[k] = new.astype(stored[j].dtype)
            new_updates[k] = LowRankLeaf.start(
                leaves[k],
                views[k],
                new_bases[k].astype(new.dtype),
                started[j].basis,
                moved,
                tracked[j].rotation,
            )
        return structure.unflatten(new_updates), TrackSubspaceState(
            count=optax.safe_increment(state.count),
            basis=structure.unflatten(new_bases),
            memory=structure.unflatten(new_memories),
        )

    hyperparams = {"update_interval": update_interval, "seed": seed}
    return stage(
        init_fn,
        Partial(update_fn, tracker=tracker, **hyperparams),
        expect_plain("track_subspace"),
        takes=("momentum",),
    )


def _moved_if_finite(
    move: Callable[[jax.Array, jax.Array, TrackerContext], Moved],
    gradient: jax.Array,
    basis: jax.Array,
    context: TrackerContext,
) -> Moved:
    """Moves one basis; keeps the old one if it or the gradient is not finite."""
    gradient = gradient.astype(basis.dtype)
    moved = move(gradient, basis, context)
    # The largest entry is computed anyway, and is NaN if any entry is.
    usable = jnp.isfinite(jnp.max(jnp.abs(gradient)))
    usable &= jnp.isfinite(jnp.max(jnp.abs(moved.basis)))
    keep = lambda new, old: jnp.where(usable, new.astype(old.dtype), old)
    return Moved(
        keep(moved.basis, basis),
        jax.tree.map(lambda leaf: jnp.where(usable, leaf, 0), moved.rotation),
        jax.tree.map(keep, moved.memory, context.memory),
    )


def check_schedule(
    update_interval: jax.typing.ArrayLike, seed: jax.typing.ArrayLike
) -> None:
    """Raises a ValueError if the update interval or the seed is invalid."""
    # Without 64-bit types JAX drops all but the last 32 bits of a seed.
    bits = jnp.iinfo(jnp.result_type(int)).bits
    check(
        "seed",
        seed,
        lambda x: (
            jnp.issubdtype(getattr(x, "dtype", type(x)), np.integer)
            and -(2 ** (bits - 1)) <= int(x) < 2**bits
        ),
        f"an int of {bits} bits",
    )
    check_steps("update_interval", update_interval, least=1)


def expect_plain(stage: str) -> Callable[[optax.Updates], None]:
    """Builds the check that no stage before the first one has added records."""

    def check_updates(updates):
        if any(map(is_record, jax.tree.leaves(updates, is_leaf=is_record))):
            raise TypeError(
                f"{stage} was given updates that have a subspace already: chain one"
                " first stage only."
            )

    return check_updates
