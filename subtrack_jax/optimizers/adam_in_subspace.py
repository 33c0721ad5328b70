"""Adam in a tracked subspace: the builder that the methods of the family call."""

from typing import Any, Literal

import jax
import optax

from subtrack_jax._internal.injection import with_values_as_operands
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.assemble import assemble
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.recover import Residual, recover_and_scale
from subtrack_jax.stages.refine import Refine, refine_directions
from subtrack_jax.stages.track import track_subspace
from subtrack_jax.stages.tracker import Tracker

Recovery = Literal["columns", "none"]

_Scalar = jax.typing.ArrayLike


@with_values_as_operands
def adam_in_subspace(
    learning_rate: optax.ScalarOrSchedule,
    tracker: Tracker,
    *,
    transport: bool | Literal["momentum"] = True,
    recovery: Recovery = "columns",
    rank: int | float = 128,
    update_interval: _Scalar = 200,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 0.25,
    recovery_scale: _Scalar = 1.0,
    growth_limit: _Scalar | None = 1.01,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    moments_dtype: Literal["int8"] | None = None,
    monitor: bool = False,
    residual: Residual = "exact",
    error_feedback: bool = False,
    refine: Refine | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Low-rank Adam whose subspaces follow any tracker: a new method in one call.

    `subtrack` and most of its siblings are this with a tracker and choices of their
    own. Leaves that are not low-rank (norms, biases, and all that `dimension_numbers`
    leave out) get plain Adam.

    Args:
      learning_rate: a number or a schedule.
      tracker: how a basis starts and moves.
      transport: what happens to the moments when a basis moves; True rewrites both
        in the new coordinates, "momentum" the first alone, False keeps both. See
        `scale_by_projection_aware_adam`.
      recovery: "columns" scales what the subspace misses column by column and adds it
        back; "none" drops it. See `recover_and_scale`.
      rank: columns r of each basis: an int, or a float in (0, 1] as a fraction of the
        smaller side of a matrix. Matrices no larger than it get plain Adam.
      update_interval: steps between two moves of the basis, below 2^31.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      scale: alpha, multiplies the part of the update inside of the subspace.
      recovery_scale: multiplies the part outside.
      growth_limit: the part outside may grow by this factor a step; None for no limit.
      weight_decay: decoupled, as in `optax.adamw`. With any but the number 0,
        `update` needs the parameters.
      mask: tree of booleans, or a function from parameters to one: which leaves
        decay.
      side: "short" puts each basis on the smaller side of its matrix, "long" on the
        larger.
      dimension_numbers: which leaves are low-rank and which of their axes form the
        matrix; see `LowRank`. None: every leaf of two axes, embeddings and heads
        among them, which the papers leave to plain Adam.
      seed: seed of random numbers, an int of 32 bits; see `track_subspace`.
      mu_dtype: dtype of the first moment; None for the parameter's, float32 at least;
        "int8" is an older spelling of `moments_dtype="int8"`.
      moments_dtype: "int8" for both moments in eight bits, block by block.
      monitor: keep each matrix' captured energy and gradient norm in the state, for a
        training loop to report; see `monitor_energy`.
      residual: what is recovered; see `recover_and_scale`.
      error_feedback: whether what a step misses is added to the next gradient; see
        `feed_back`, which the chain has for this and for trackers that need momentum.
      refine: changes Adam's directions (..., r, n) before they are lifted.

    Returns:
      The optimizer. Under `optax.inject_hyperparams` name `rank` among the static
      arguments, and any of `mask` and `dimension_numbers` that is a function; with
      parameters in 16 bits, in which b2 = 0.999 would be 1, also pass it
      `hyperparam_dtype=jnp.float32`. Updates leave in the wider dtype of gradient and
      parameter, if `update` is given the parameters. `update` has derivatives in
      forward and reverse mode; second ones in forward mode over reverse mode
      (`jax.jvp` of `jax.grad`), as not all of its parts can be reversed twice.

    Raises:
      ValueError: if an argument is out of its range, or, on `init`, if no leaf is
        low-rank.

    Example:
      >>> import optax
      >>> import subtrack_jax as stj
      >>> tracker = stj.switch(stj.svd(), stj.geodesic(), after_steps=1_000)
      >>> optimizer = stj.adam_in_subspace(1e-3, tracker, recovery="none", rank=64)
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    rule = scale_by_projection_aware_adam(
        low_rank, b1, b2, eps, mu_dtype, transport, moments_dtype
    )
    if refine is not None:
        rule = optax.chain(rule, refine_directions(low_rank, refine))
    feeds_back = tracker.needs_momentum or error_feedback
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        rule,
        recover_and_scale(
            low_rank, scale, recovery, recovery_scale, growth_limit, residual
        ),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
        feedback=(b1, error_feedback) if feeds_back else None,
    )
