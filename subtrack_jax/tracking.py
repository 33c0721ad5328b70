"""The first stage: a subspace for every low-rank gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import sharding
from subtrack_jax._validation import check
from subtrack_jax.leaves import content, is_box, map_leaves, state_dtype
from subtrack_jax.low_rank import LowRank
from subtrack_jax.matrix_view import MatrixView
from subtrack_jax.record import LowRankLeaf, is_record
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

        def moves():
            return [
                _refresh(views[k], tracker.move, key, gradients[k], basis)
                for k, basis in zip(chosen, bases, strict=True)
            ]

        # Branches return the same types: ask which kind of rotation moves give.
        still = [
            None if rotation is None else RankOneRotation.identity(basis)
            for basis, (_, rotation) in zip(bases, jax.eval_shape(moves), strict=True)
        ]

        def starts():
            def start(key, gradient, basis):
                return tracker.start(key, gradient, basis.shape[-1]), None

            return [
                (_refresh(views[k], start, key, gradients[k], basis)[0], rotation)
                for k, basis, rotation in zip(chosen, bases, still, strict=True)
            ]

        is_start = state.count == 0
        moved = ~is_start & (state.count % sharding.local(update_interval) == 0)
        # One conditional for the whole tree, and outside of any vmap, which
        # would make a select of it and pay for a refresh on every step.
        tracked = jax.lax.switch(
            jnp.where(is_start, 2, moved.astype(jnp.int32)),
            [lambda: list(zip(bases, still, strict=True)), moves, starts],
        )
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


def _refresh(
    view: MatrixView, move, key: jax.Array, gradient: jax.Array, basis: jax.Array
):
    """Moves the bases of one leaf, each only if all that goes in and out is finite."""

    def move_one(gradient, basis):
        gradient = gradient.astype(basis.dtype)
        new_basis, rotation = move(key, gradient, basis)
        usable = jnp.all(jnp.isfinite(gradient)) & jnp.all(jnp.isfinite(new_basis))
        return (
            jnp.where(usable, new_basis.astype(basis.dtype), basis),
            jax.tree.map(lambda leaf: jnp.where(usable, leaf, 0), rotation),
        )

    return view.map(move_one, gradient, basis)
