"""Adam on coordinates, with moments that are transported when the basis moves."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from subtrack_jax._internal import eight_bit
from subtrack_jax._internal.validation import check, check_decay, check_precise
from subtrack_jax.low_rank import LowRank
from subtrack_jax.stages.on_coordinates import on_coordinates
from subtrack_jax.stages.transport import Transport, transport_adam, transport_momentum


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
    check_decay("b2", b2, 0.999)  # first, because it suffers most from rounding
    check_decay("b1", b1, 0.9)
    small = "0 or a small positive number"
    check_precise("eps", eps, lambda x: 0 <= x < float("inf"), small, 1e-8)
    mu_dtype, is_int8 = _storage(mu_dtype, moments_dtype)
    if transport not in (True, False, "momentum"):
        raise ValueError(f"transport={transport!r}: use True, False or 'momentum'.")
    follow: dict[Any, Transport | None] = {
        True: Partial(transport_adam, b1=b1, b2=b2),
        False: None,
        "momentum": transport_momentum,
    }

    def update_fn(updates, state, params=None, *, b1, b2, eps):
        adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
        return adam.update(updates, state, params)

    inner = optax.GradientTransformation(
        optax.scale_by_adam(mu_dtype=mu_dtype).init,
        Partial(update_fn, b1=b1, b2=b2, eps=eps),
    )
    transport_state = follow[transport]
    if is_int8:
        inner = eight_bit.in_eight_bits(inner)
        transport_state = transport_state and eight_bit.transported(transport_state)
    return on_coordinates(low_rank, inner, transport_state)


def _storage(
    mu_dtype: jax.typing.DTypeLike | None, moments_dtype: Any
) -> tuple[jax.typing.DTypeLike | None, bool]:
    """Resolves the first moment's dtype, and whether both moments have eight bits."""

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
