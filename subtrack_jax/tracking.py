"""The first stage: a subspace for every low-rank gradient."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import sharding
from subtrack_jax._validation import check
from subtrack_jax.in_place import apply_if
from subtrack_jax.leaves import content, is_box, map_leaves, state_dtype
from subtrack_jax.low_rank import LowRank
from subtrack_jax.record import LowRankLeaf, is_record
from subtrack_jax.refresh import Leaf, refresh
from subtrack_jax.rotation import RankOneRotation
from subtrack_jax.trackers import Tracker


class TrackSubspaceState(NamedTuple):
    """The subspaces, and when they were last due.

    Attributes:
      count: steps taken so far; scalar int32.
      basis: S for each low-rank leaf, of shape (..., m, r), orthonormal;
        `optax.MaskedNode` for other leaves.
    """

    count: jax.Array  # type: ignore[assignment]  # also a method of tuples
    basis: optax.Updates


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
      update_interval: steps between moves, at least 1.
      seed: of the tracker's random numbers. They depend on it, on the step and
        on the matrix' shape alone, so that a stacked leaf, its slices in leaves
        of their own, and the same leaves in another tree all evolve alike.
      basis_dtype: dtype in which bases are stored; None for the parameter's,
        float32 at least, in which they are computed in any case. bfloat16 keeps
        a basis orthonormal to about 1e-2 only.

    Returns:
      A transformation whose updates are for `project`. Other leaves pass.

    Raises:
      ValueError: if `update_interval` is below 1; on `init`, if no leaf matches.
    """
    check(
        "seed",
        seed,
        lambda x: jnp.issubdtype(jnp.result_type(x), jnp.integer),
        "an int",
    )
    check(
        "update_interval",
        update_interval,
        lambda x: x >= 1 and x == int(x),
        "an int >= 1",
    )

    def init_fn(params):
        return TrackSubspaceState(
            count=jnp.zeros([], jnp.int32),
            basis=map_leaves(
                lambda leaf, view: sharding.basis_like(
                    leaf, view, jnp.dtype(basis_dtype or state_dtype(leaf.dtype))
                ),
                lambda _: optax.MaskedNode(),
                params,
                low_rank.views(params),
            ),
        )

    def update_fn(updates, state, **extra_args):
        del extra_args
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_box)
        views = structure.flatten_up_to(low_rank.views(updates))
        chosen = [k for k, view in enumerate(views) if view is not None]
        stored = [structure.flatten_up_to(state.basis)[k] for k in chosen]
        bases = [basis.astype(state_dtype(basis.dtype)) for basis in stored]
        gradients = {k: content(leaves[k]) for k in chosen}
        key = jax.random.fold_in(jax.random.key(sharding.local(seed)), state.count)

        def start(gradient, basis):
            return tracker.start(key, gradient, basis.shape[-1]), None

        def refreshed(move, bases):
            return refresh(
                move,
                [
                    Leaf(views[k], gradients[k], basis)
                    for k, basis in zip(chosen, bases, strict=True)
                ],
            )

        def moves(tracked):
            move = functools.partial(tracker.move, key)
            return refreshed(move, [basis for basis, _ in tracked])

        is_start = state.count == 0
        moved = ~is_start & (state.count % sharding.local(update_interval) == 0)
        # Decided for the whole tree, and outside of any vmap, which would make a
        # select of it and pay for a refresh on every step.
        bases = apply_if(
            is_start,
            lambda bases: [basis for basis, _ in refreshed(start, bases)],
            bases,
            "start_subspaces",
        )
        # A loop takes what it returns: ask which kind of rotation moves give.
        kinds = jax.eval_shape(moves, [(basis, None) for basis in bases])
        tracked = [
            (basis, None if rotation is None else RankOneRotation.identity(basis))
            for basis, (_, rotation) in zip(bases, kinds, strict=True)
        ]
        tracked = apply_if(moved, moves, tracked, "move_subspaces")
        new_updates, new_bases = list(leaves), [optax.MaskedNode()] * len(leaves)
        for j, k in enumerate(chosen):
            old, (new, rotation) = bases[j], tracked[j]
            new_bases[k] = new.astype(stored[j].dtype)
            new_updates[k] = LowRankLeaf(
                gradient=gradients[k],
                basis=new_bases[k].astype(new.dtype),
                previous_basis=old,
                rank_one=rotation,
                moved=moved,
                coordinates=None,
                direction=None,
                view=views[k],
                box=jax.tree.structure(leaves[k]),
            )
        return structure.unflatten(new_updates), TrackSubspaceState(
            count=optax.safe_increment(state.count),
            basis=structure.unflatten(new_bases),
        )

    def check_updates(updates):
        if any(map(is_record, jax.tree.leaves(updates, is_leaf=is_record))):
            raise TypeError(
                "track_subspace was given updates that have a subspace already:"
                " chain one track_subspace only."
            )

    return sharding.stage(init_fn, update_fn, check_updates)
