"""Into the subspace, and inner rules that run there.

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
from subtrack_jax._validation import check
from subtrack_jax.in_place import apply_if
from subtrack_jax.leaves import is_box, map_leaves, state_dtype
from subtrack_jax.low_rank import LowRank
from subtrack_jax.record import expect_records, is_record, map_records
from subtrack_jax.transport import transport_adam, transport_momentum

Transport = Callable[[optax.OptState, Any], optax.OptState]


def project(low_rank: LowRank) -> optax.GradientTransformationExtraArgs:
    """Adds to every low-rank gradient its coordinates A = S^T G.

    Args:
      low_rank: the same `LowRank` as in the other stages.

    Returns:
      A stateless transformation, to be chained after `track_subspace`. Products
      accumulate in the basis' dtype, float32 at least.
    """

    def update_fn(updates, state, **extra_args):
        del extra_args

        def add_coordinates(record):
            basis = sharding.whole_basis(record.basis, record.view)
            coordinates = record.view.project(basis, record.gradient)
            return record.replace(coordinates=sharding.whole_rank(coordinates))

        return map_records(add_coordinates, lambda g: g, updates), state

    return sharding.stage(
        optax.init_empty_state, update_fn, expect_records("project", low_rank, "basis")
    )


def on_coordinates(
    low_rank: LowRank,
    inner: optax.GradientTransformation,
    transport: Transport | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs an ordinary transformation in the coordinates of low-rank leaves.

    Other leaves are given to the same rule as they are. The rule sees no
    parameters, whose shapes do not fit: put weight decay after the recovery. It
    computes in float32 at least; what it returns for other leaves leaves in the
    gradient's dtype.

    Args:
      low_rank: the same `LowRank` as in the other stages.
      inner: the rule, `optax.scale_by_lion()` for example.
      transport: what happens to the rule's state on a step that moves a basis.
        None keeps it: its numbers then belong to the old coordinates, an error
        that fades as the rule forgets. `transport_momentum` turns the momentum of
        any rule. Any function will do that gets the rule's state and a tree with a
        `Rotation` for each low-rank leaf, other leaves masked out of both
        (`optax.MaskedNode`), and returns the state in the new coordinates.

    Returns:
      A transformation, to be chained after `project`. Its state is the rule's.

    Example:
      >>> import optax
      >>> import subtrack_jax as stj
      >>> low_rank = stj.LowRank(rank=8)
      >>> low_rank_lion = optax.chain(
      ...     stj.track_subspace(low_rank, stj.geodesic(), update_interval=50),
      ...     stj.project(low_rank),
      ...     stj.on_coordinates(low_rank, optax.scale_by_lion()),
      ...     stj.recover_and_scale(low_rank, recovery="none"),
      ...     optax.scale_by_learning_rate(1e-4),
      ... )
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        def coordinates(leaf, view):
            return sharding.coordinates_like(leaf, view, state_dtype(leaf.dtype))

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
        directions, state = inner.update(values, state, **extra_args)
        return map_records(
            lambda record, direction: record.replace(direction=direction),
            functools.partial(jax.tree.map, lambda g, x: x.astype(g.dtype)),
            updates,
            directions,
        ), state

    return sharding.stage(
        init_fn, update_fn, expect_records("on_coordinates", low_rank, "coordinates")
    )


def scale_by_projection_aware_adam(
    low_rank: LowRank,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: jax.typing.DTypeLike | None = None,
    transport: bool | Literal["momentum"] = True,
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
        its small increments.
      transport: what happens to the moments when the basis moves. True rewrites
        both; "momentum" the first alone (`transport_momentum`), as in GoLore (He et
        al. 2024, arXiv 2410.11289); False keeps both as they are, as in GaLore and
        SubTrack (2024).

    Returns:
      A transformation, to be chained after `project`. Its state is an
      `optax.ScaleByAdamState`, moments of low-rank leaves of shape (..., r, n).

    Raises:
      ValueError: if an argument is out of its range.
    """
    check("b1", b1, lambda x: 0 <= x < 1, "in [0, 1)")
    check("b2", b2, lambda x: 0 <= x < 1, "in [0, 1)")
    if mu_dtype is not None:
        check(
            "mu_dtype",
            mu_dtype,
            lambda x: jnp.issubdtype(jnp.dtype(x), jnp.floating),
            "a floating-point dtype",
        )
    check("eps", eps, lambda x: 0 <= x < float("inf"), "0 or a small positive number")
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

    return on_coordinates(
        low_rank,
        optax.GradientTransformation(
            lambda params: adam().init(params),
            lambda *arguments: adam().update(*arguments),
        ),
        follow[transport],
    )


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
        is_leaf=is_box,
    )


def _fill(masked: Any, tree: Any) -> Any:
    """What is masked in one tree is taken from another."""
    is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
    return jax.tree.map(
        lambda leaf, other: other if is_masked(leaf) else leaf,
        masked,
        tree,
        is_leaf=is_masked,
    )
