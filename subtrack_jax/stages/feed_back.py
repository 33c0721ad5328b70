"""Feedback of the inner rule's momentum and error to the tracker."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from subtrack_jax._internal.eight_bit import EightBitAdamState, decode_moments
from subtrack_jax._internal.mesh import placed_like
from subtrack_jax._internal.trees import as_arrays, is_masked, map_leaves, state_dtype
from subtrack_jax._internal.validation import check_decay
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.checks import expect_records, expect_shapes, expect_state
from subtrack_jax.stages.record import LowRankLeaf, map_records, widened
from subtrack_jax.stages.stage import stage


class FeedBackState(NamedTuple):
    """State of the chain, and its accumulated error.

    Attributes:
      inner: state of the chain.
      error: E, added to the next gradient, of the shape of each low-rank leaf;
        `optax.MaskedNode` for other leaves and without error feedback.
    """

    inner: Any
    error: optax.Updates


def feed_back(
    low_rank: LowRank,
    stages: optax.GradientTransformation,
    b1: jax.typing.ArrayLike = 0.9,
    error_feedback: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Passes momentum and error of a chain back to its tracker.

    Trackers of the chain receive the bias-corrected first moment of the last step
    (`Tracker.needs_momentum`). With error feedback no part of a gradient is lost: what
    a step leaves out, and what the moments lose when the basis moves, is added to the
    next gradient (LDAdam's generalised error feedback, Robert et al.
    2024, arXiv 2410.16103, algorithm 1):
    E = G - S A + b1 / (1 - b1) (S_{t-1} M_{t-1} - S C M_{t-1}).
    It costs a buffer of the parameter's size, in float32 at least, and two products.
    The stages, `monitor_energy` among them, see the gradient with the error added.

    Args:
      low_rank: the same `LowRank` as in the stages.
      stages: `track_subspace`, `project` and an inner rule, chained, with a first
        moment called `mu` and a `count` in its state, as Adam's.
      b1: decay of that moment, in [0, 1).
      error_feedback: whether errors are kept and added.

    Returns:
      A transformation to be chained before the recovery, which with error feedback
      should be "none": what is recovered at once need not come again. A gradient with
      a NaN or an infinity leaves the error of its matrix as it was.

    Raises:
      ValueError: if an argument is out of its range.
      TypeError: on `init`, if the stages keep no first moment.

    Example:
      >>> import optax
      >>> import subtrack_jax as stj
      >>> low_rank = stj.LowRank(rank=8)
      >>> stages = optax.chain(
      ...     stj.track_subspace(low_rank, stj.geodesic(), update_interval=50),
      ...     stj.project(low_rank),
      ...     stj.scale_by_projection_aware_adam(low_rank),
      ... )
      >>> subtrack_with_error_feedback = optax.chain(
      ...     stj.feed_back(low_rank, stages, error_feedback=True),
      ...     stj.recover_and_scale(low_rank, scale=1.0, recovery="none"),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )
    """
    check_decay("b1", b1, 0.9)
    stages = optax.with_extra_args_support(stages)

    def sum_fn(updates, error):
        views = low_rank.views(updates)
        error_shape = lambda view: view.shape if error_feedback else None
        expect_shapes("feed_back", "error", error, updates, views, error_shape)
        return jax.tree.map(_with_error, updates, error), error

    add_error = stage(optax.init_empty_state, sum_fn, lambda _: None, jitted=False)
    keep_error = stage(
        optax.init_empty_state,
        Partial(_keep_error, b1=b1),
        expect_records("feed_back", low_rank, "direction"),
        takes=("mu", "gradients"),
    )

    def init_fn(params):
        def zeros(leaf, _):
            return jnp.zeros_like(leaf, state_dtype(leaf.dtype))

        empty = lambda _: optax.MaskedNode()
        error = map_leaves(
            zeros if error_feedback else lambda leaf, _: empty(leaf),
            empty,
            params,
            low_rank.views(params),
        )
        inner = stages.init(params)
        _moments(inner)  # raises if there are none
        return FeedBackState(inner, error)

    def update_fn(updates, state, params=None, **extra_args):
        expect_state("feed_back", FeedBackState, state)
        updates = widened(as_arrays(updates), params)
        summed, _ = add_error.update(updates, state.error)
        moments = _moments(state.inner)
        mu = moments.mu
        if isinstance(moments, EightBitAdamState):
            decoded = lambda codes: decode_moments(codes).mu
            mu = placed_like(mu, decoded, moments)

        def corrected(mean, _):
            dtype = jnp.promote_types(mean.dtype, jnp.float32)
            # An array: a Python integer would be a constant of another program.
            weight = 1 - jnp.asarray(b1, dtype) ** moments.count.astype(dtype)
            return mean.astype(dtype) / jnp.where(weight > 0, weight, 1)

        extra_args["momentum"] = map_leaves(
            corrected, lambda _: optax.MaskedNode(), mu, low_rank.views(updates)
        )
        records, inner = stages.update(summed, state.inner, params, **extra_args)
        error = state.error
        if error_feedback:
            records, error = keep_error.update(records, error, mu=mu, gradients=updates)
        return records, FeedBackState(inner, error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moments(state: optax.OptState) -> Any:
    """Finds the unique part of a state with a first moment and its count."""
    # Matched by field names: parameters may be named mu.
    has_both = lambda node: {"mu", "count"} <= set(getattr(node, "_fields", ()))
    found = [x for x in jax.tree.leaves(state, is_leaf=has_both) if has_both(x)]
    if len(found) != 1:
        raise TypeError(
            f"feed_back found {len(found)} first moments mu with a count in its stages:"
            " chain one scale_by_projection_aware_adam last among them."
        )
    return found[0]


def _with_error(gradient: Any, error: Any) -> Any:
    if is_masked(error):
        return gradient
    # In the error's dtype: bfloat16 would lose most of a small error.
    return gradient.astype(error.dtype) + error


def _keep_error(
    records: Any,
    errors: optax.Updates,
    mu: Any,
    gradients: optax.Updates,
    b1: Any,
) -> tuple[Any, optax.Updates]:
    """Errors of a step: of its update, and of rotating the moments before it."""
    weight = b1 / (1 - b1)

    def of_matrices(record: LowRankLeaf, old: jax.Array, mean: jax.Array) -> jax.Array:
        view, before = record.view, weight * mean.astype(record.basis.dtype)
        after = record.coordinates + record.rotation.rotate(before)
        inside = view.lift(record.basis, after)
        lost = view.lift(record.previous_basis, before) - inside
        new = view.matrix(record.gradient).astype(old.dtype) + lost.astype(old.dtype)
        usable = jnp.isfinite(new).all(axis=(-2, -1), keepdims=True)
        return jnp.where(usable, new, old)

    def error(record: LowRankLeaf, old: jax.Array, mean: jax.Array) -> jax.Array:
        view = record.view
        return view.leaf(record.map(of_matrices, view.matrix(old), mean))

    def in_own_dtype(record: LowRankLeaf, gradient: jax.Array) -> LowRankLeaf:
        return record.replace(gradient=record.gradient.astype(gradient.dtype))

    plain = lambda *_: optax.MaskedNode()
    new_errors = map_records(error, plain, records, errors, mu)
    return map_records(in_own_dtype, lambda g, _: g, records, gradients), new_errors
