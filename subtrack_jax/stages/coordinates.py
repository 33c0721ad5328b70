"""Projection into the subspace, and optimizer rules that run in its coordinates.

`project` computes coordinates; `on_coordinates` runs any optax transformation
on them, `scale_by_projection_aware_adam` runs Adam and keeps its moments true
to a basis that moves.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from subtrack_jax import sharding
from subtrack_jax._internal import eight_bit, placement
from subtrack_jax._internal.leaves import is_box, is_masked, map_leaves, state_dtype
from subtrack_jax._internal.loops import apply_if
from subtrack_jax._internal.record import (
    LowRankLeaf,
    expect_records,
    is_record,
    map_records,
    widened,
)
from subtrack_jax._internal.state_check import expect_rule_state
from subtrack_jax._internal.validation import check, check_decay, check_precise
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.transport import transport_adam, transport_momentum

Transport = Callable[[optax.OptState, Any], optax.OptState]


def project(low_rank: LowRank) -> optax.GradientTransformationExtraArgs:
    """Adds to every low-rank gradient its coordinates A = S^T G.

    Args:
      low_rank: the same `LowRank` as in the other stages.

    Returns:
      A stateless transformation, to be chained after `track_subspace`. Products
      accumulate in the basis' dtype, float32 at least. Gradients, and with them the
      updates, leave in the wider of their own dtype and the parameter's, if `update`
      is given the parameters.
    """

    def update_fn(updates, state, **extra_args):
        del extra_args
        return map_records(
            lambda record: record.replace(coordinates=record.map(_coordinates)),
            lambda g: g,
            updates,
        ), state

    stage = sharding.stage(
        optax.init_empty_state, update_fn, expect_records("project", low_rank, "basis")
    )

    def update(updates, state, params=None, **extra_args):
        return stage.update(widened(updates, params), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(stage.init, update)


# Jitted, as other functions of one record: traced once for leaves that are alike.
@jax.jit
def _coordinates(record: LowRankLeaf) -> jax.Array:
    basis = placement.replicated_basis(record.basis, record.view)
    return placement.unsplit_rank(record.view.project(basis, record.gradient))


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
    inner = optax.with_extra_args_support(inner)

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

    def update_fn(updates, state, **extra_args):
        values = map_records(
            lambda record: record.coordinates,
            functools.partial(jax.tree.map, lambda g: g.astype(state_dtype(g.dtype))),
            updates,
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values)
        leaves, structure = jax.tree.flatten(shapes)
        expect_rule_state("on_coordinates", state, new_state(structure, tuple(leaves)))
        leaves = jax.tree.leaves(updates, is_leaf=is_record)
        moved = [leaf.moved for leaf in leaves if is_record(leaf)]
        if transport is not None and moved:
            rotations = map_records(
                lambda record: record.rotation, lambda _: optax.MaskedNode(), updates
            )
            old = _mask_plain(inner, state, updates)
            new = apply_if(
                moved[0], lambda state: transport(state, rotations), old, "turn_moments"
            )
            state = _fill(new, state)
        try:
            directions, state = inner.update(values, state, shapes, **extra_args)
        except TypeError as error:
            if "ShapeDtypeStruct" not in str(error):
                raise
            raise TypeError(
                "on_coordinates was given a rule that reads the parameters, which have"
                " another shape than coordinates: chain it after the recovery."
            ) from error
        return map_records(
            lambda record, direction: record.replace(direction=direction),
            functools.partial(jax.tree.map, lambda g, x: x.astype(g.dtype)),
            updates,
            directions,
        ), state

    return sharding.stage(
        init_fn,
        update_fn,
        expect_records("on_coordinates", low_rank, "coordinates"),
        forwards=True,
    )


def scale_by_projection_aware_adam(
    low_rank: LowRank,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    transport: bool | Literal["momentum"] = True,
    moments_dtype: Literal["int8"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam on coordinates, with moments that follow the basis.

    On a step that moved the basis the moments are first rewritten in the new
    coordinates (`transport_adam`, unless `transport` says otherwise); then, and on
    all other leaves, it is `optax.scale_by_adam`.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      mu_dtype: dtype of the first moment; None for the parameter's, float32 at
        least. The second moment always has the latter: bfloat16 cannot hold
        its small increments. "int8" is an older spelling of
        `moments_dtype="int8"`.
      transport: what happens to the moments when the basis moves. True rewrites
        both; "momentum" the first alone (`transport_momentum`), as in GoLore (He et
        al. 2024, arXiv 2410.11289); False keeps both as they are, as in GaLore and
        SubTrack (2024).
      moments_dtype: "int8" for 8-bit block-wise moments (Dettmers et al. 2022, arXiv
        2110.02861), both of them, of all leaves of at least 4096 numbers in rows of at
        least 32: a quarter of float32's bytes, see `EightBitAdamState`. None for the
        first moment as `mu_dtype` says.

    Returns:
      A transformation, to be chained after `project`. Its state is an
      `optax.ScaleByAdamState`, moments of low-rank leaves of shape (..., r, n), or
      an `EightBitAdamState` of codes of these shapes.

    Raises:
      ValueError: if an argument is out of its range.
    """
    check_decay("b2", b2, 0.999)  # first: it suffers most from rounding
    check_decay("b1", b1, 0.9)
    small = "0 or a small positive number"
    check_precise("eps", eps, lambda x: 0 <= x < float("inf"), small, 1e-8)
    mu_dtype, is_int8 = _storage(mu_dtype, moments_dtype)
    if transport not in (True, False, "momentum"):
        raise ValueError(f"transport={transport!r}: use True, False or 'momentum'.")
    follow: dict[Any, Transport | None] = {
        True: functools.partial(transport_adam, b1=b1, b2=b2),
        False: None,
        "momentum": transport_momentum,
    }

    def adam():
        return optax.scale_by_adam(
            *map(sharding.local, (b1, b2, eps)), mu_dtype=mu_dtype
        )

    inner = optax.GradientTransformation(
        lambda params: adam().init(params),
        lambda *arguments: adam().update(*arguments),
    )
    transport_state = follow[transport]
    if is_int8:
        inner = eight_bit.in_eight_bits(inner)
        transport_state = transport_state and eight_bit.transported(transport_state)
    return on_coordinates(low_rank, inner, transport_state)


def _storage(
    mu_dtype: jax.typing.DTypeLike | None, moments_dtype: Any
) -> tuple[jax.typing.DTypeLike | None, bool]:
    """The first moment's dtype, and whether both moments are in eight bits."""

    def is_int8(dtype):
        return jnp.dtype(dtype) == jnp.int8

    if moments_dtype is not None:
        words = "'int8' (both moments in eight bits) or None; see mu_dtype"
        check("moments_dtype", moments_dtype, is_int8, words)
    if mu_dtype is None:
        return None, moments_dtype is not None
    check(
        "mu_dtype",
        mu_dtype,
        lambda x: jnp.issubdtype(jnp.dtype(x), jnp.floating) or is_int8(x),
        "a floating-point dtype, or int8 as moments_dtype",
    )
    if is_int8(mu_dtype):
        return None, True
    if moments_dtype is not None:
        raise ValueError(
            f"mu_dtype={mu_dtype!r} and moments_dtype={moments_dtype!r} exclude each"
            " other: give one of them."
        )
    return mu_dtype, False


def _mask_plain(
    inner: optax.GradientTransformation, state: optax.OptState, updates: Any
) -> optax.OptState:
    """The rule's state without what belongs to plain leaves."""
    is_low_rank = map_records(lambda _: True, lambda _: False, updates)
    return optax.tree.map_params(
        inner,
        lambda leaf, keep: leaf if keep else optax.MaskedNode(),
        state,
        is_low_rank,
        # Masked already: leaves that the rule itself leaves to another.
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
