"""Runs any optax transformation in the coordinates of low-rank leaves."""

import functools
from typing import Any

import jax
import optax
from jax.tree_util import Partial

from subtrack_jax._internal import placement
from subtrack_jax._internal.boxes import is_box, unboxed
from subtrack_jax._internal.eight_bit import with_scales_of
from subtrack_jax._internal.loops import apply_if
from subtrack_jax._internal.trees import is_masked, map_leaves, state_dtype
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_records, expect_rule_state
from subtrack_jax.stages.record import is_record, map_records
from subtrack_jax.stages.stage import stage
from subtrack_jax.stages.transport import Transport


def on_coordinates(
    low_rank: LowRank,
    inner: optax.GradientTransformation,
    transport: Transport | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs an ordinary transformation in the coordinates of low-rank leaves.

    Other leaves are given to the same rule as they are. In place of parameters the
    rule sees their shapes (`jax.ShapeDtypeStruct`), those of coordinates for low-rank
    leaves: put weight decay after the recovery. It computes in float32 at least; what
    it returns for other leaves leaves in the gradient's dtype.

    Four rules, and what their state is once the basis has moved:

    - `optax.scale_by_lion`: its momentum `mu` belongs to the old coordinates if kept,
      and to the new ones with `transport_momentum`.
    - `optax.trace` (SGD): the same holds for its `trace`, which when turned is the
      trace of past gradients inside the subspace, as seen from the new basis.
    - `optax.scale_by_factored_rms` (Adafactor): it has no momentum to turn; of its
      factored statistics the one of columns is nearly the same in all bases of a
      subspace, the one of coordinates belongs to the old until forgotten. It factors
      the two largest axes, if `min_dim_size_to_factor` is at most the rank: the rank
      should be above the number of stacked layers.
    - `optax.contrib.scale_by_muon`: its `mu` is as Lion's, and orthogonalised after
      it is turned; coordinates (..., r, n) need the dimension numbers (-2, -1), and
      vectors another rule through `optax.partition`, as in the example.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      inner: the rule.
      transport: what happens to the rule's state on a step that moves a basis.
        None keeps it: its numbers then belong to the old coordinates, an error
        that fades as the rule forgets. `transport_momentum` turns the momentum of
        any rule. Any function will do that gets the rule's state and a tree with a
        `Rotation` for each low-rank leaf, other leaves masked out of both
        (`optax.MaskedNode`), and returns the state in the new coordinates.

    Returns:
      A transformation, to be chained after `project`. Its state is the rule's.

    Example:
      >>> import jax, optax
      >>> import subtrack_jax as stj
      >>> from optax.contrib import MuonDimensionNumbers, scale_by_muon
      >>> def rows_and_columns(updates):
      ...     return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)
      >>> rule = optax.partition(
      ...     {
      ...         "matrix": scale_by_muon(weight_dimension_numbers=rows_and_columns),
      ...         "vector": optax.scale_by_adam(),
      ...     },
      ...     lambda params: jax.tree.map(
      ...         lambda leaf: "matrix" if leaf.ndim > 1 else "vector", params
      ...     ),
      ... )
      >>> low_rank = stj.LowRank(rank=8)
      >>> low_rank_muon = optax.chain(
      ...     stj.track_subspace(low_rank, stj.geodesic(), update_interval=50),
      ...     stj.project(low_rank),
      ...     stj.on_coordinates(low_rank, rule, transport=stj.transport_momentum),
      ...     stj.recover_and_scale(low_rank, recovery="none"),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
      >>> params = {"kernel": jax.numpy.ones((16, 64)), "bias": jax.numpy.ones(64)}
      >>> state = low_rank_muon.init(params)
      >>> optax.tree.get_all_with_path(state, "mu")[0][1]["kernel"].shape
      (8, 64)
    """

    @functools.lru_cache(maxsize=8)
    def new_state(structure, shapes):
        return jax.eval_shape(inner.init, structure.unflatten(shapes))

    def init_fn(params):
        def coordinates(leaf, view):
            return placement.coordinates_like(leaf, view, state_dtype(leaf.dtype))

        def plain(leaf):
            dtype = state_dtype(leaf.dtype)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf.update(dtype=dtype)
            return leaf.astype(dtype)

        return inner.init(
            map_leaves(
                coordinates,
                functools.partial(jax.tree.map, plain),
                params,
                low_rank.views(params),
            )
        )

    def update_fn(updates, state, *, inner, transport, **extra_args):
        values = map_records(
            lambda record: record.coordinates,
            lambda g: g.astype(state_dtype(g.dtype)),
            updates,
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
        leaves, structure = jax.tree.flatten(shapes)
        expected = with_scales_of(new_state(structure, tuple(leaves)), state)
        expect_rule_state("on_coordinates", state, expected)
        records = filter(is_record, jax.tree.leaves(updates, is_leaf=is_record))
        moved = [record.moved for record in records]
        if transport is not None and moved:
            state = _transported_if(moved[0], transport, inner, state, unboxed(updates))
        try:
            directions, state = optax.with_extra_args_support(inner).update(
                values, state, shapes, **extra_args
            )
        except TypeError as error:
            if "ShapeDtypeStruct" not in str(error):
                raise
            raise TypeError(
                "on_coordinates was given a rule that reads the parameters, which have"
                " another shape than coordinates: chain it after the recovery."
            ) from error
        return map_records(
            lambda record, direction: record.replace(direction=direction),
            lambda g, x: x.astype(g.dtype),
            updates,
            directions,
        ), state

    return stage(
        init_fn,
        Partial(update_fn, inner=inner, transport=transport),
        expect_records("on_coordinates", low_rank, "coordinates"),
        forwards=True,
        keeps_boxes=True,  # the rule sees plain leaves as they are
    )


def _transported_if(
    moved: jax.Array,
    transport: Transport,
    inner: optax.GradientTransformation,
    state: optax.OptState,
    updates: Any,
) -> optax.OptState:
    """Transports the rule's state in steps that change the bases."""
    rotations = map_records(
        lambda record: record.rotation, lambda _: optax.MaskedNode(), updates
    )
    old = _mask_plain(inner, state, updates)
    new = apply_if(moved, lambda old: transport(old, rotations), old, "turn_moments")
    return _fill(new, state)


def _mask_plain(
    inner: optax.GradientTransformation, state: optax.OptState, updates: Any
) -> optax.OptState:
    """Masks the plain leaves of the rule's state."""
    is_low_rank = map_records(lambda _: True, lambda _: False, updates)
    return optax.tree.map_params(
        inner,
        lambda leaf, keep: leaf if keep else optax.MaskedNode(),
        state,
        is_low_rank,
        # Already masked: leaves that the rule leaves to another one.
        is_leaf=lambda node: is_box(node) or is_masked(node),
    )


def _fill(masked: Any, tree: Any) -> Any:
    """Replaces the masked nodes of one tree by those of another."""
    return jax.tree.map(
        lambda leaf, other: other if is_masked(leaf) else leaf,
        masked,
        tree,
        is_leaf=is_masked,
    )
