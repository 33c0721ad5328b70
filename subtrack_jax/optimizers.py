"""The family: each member a choice of tracker, transport and recovery.

| optimizer       | basis, every `update_interval` steps | moments     | recovery |
|-----------------|--------------------------------------|-------------|----------|
| `subtrack`      | turns along a rank-one geodesic      | transported | columns  |
| `subtrack_grad` | turns along a rank-one geodesic      | kept        | none     |
| `grass_walk`    | walks along a random geodesic        | transported | columns  |
| `grass_jump`    | drawn anew at random                 | transported | columns  |
| `galore`        | leading singular vectors anew        | kept        | none     |
| `fira`          | leading singular vectors anew        | kept        | columns  |

All are the same chain of stages. Written out, this is `subtrack`, to the last
bit:

  >>> import optax
  >>> import subtrack_jax as stj
  >>> low_rank = stj.LowRank(rank=128)
  >>> optimizer = optax.chain(
  ...     stj.track_subspace(low_rank, stj.geodesic(), update_interval=200),
  ...     stj.project(low_rank),
  ...     stj.scale_by_projection_aware_adam(low_rank, b1=0.9, b2=0.999),
  ...     stj.recover_and_scale(low_rank, scale=0.25, growth_limit=1.01),
  ...     optax.add_decayed_weights(0.1),
  ...     optax.scale_by_learning_rate(1e-3),
  ... )
"""

from typing import Any, Literal

import jax
import optax

from subtrack_jax import trackers
from subtrack_jax.chains import assemble
from subtrack_jax.coordinates import scale_by_projection_aware_adam
from subtrack_jax.low_rank import LowRank
from subtrack_jax.recovery import recover_and_scale
from subtrack_jax.trackers import Init
from subtrack_jax.tracking import track_subspace

_Scalar = jax.typing.ArrayLike


def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    *,
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
    monitor: bool = False,
    init: Init = "randomized",
    step_size: _Scalar | None = None,
    damping: _Scalar = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """SubTrack++: a subspace that follows the gradient, and Adam inside of it.

    Rajabi, Nonta & Rambhatla, "SubTrack++: Gradient subspace tracking for
    scalable LLM training", NeurIPS 2025, arXiv 2502.01586. Every
    `update_interval` steps the basis of each matrix turns along the Grassmann
    geodesic that lowers its projection error fastest; Adam's moments turn with
    it, and what the subspace misses is scaled column by column and added back.
    Leaves that are not low-rank (norms, biases, and all that
    `dimension_numbers` leave out) get plain Adam.

    For a matrix with sides m <= n the state holds m r + 2 r n numbers, where
    Adam's holds 2 m n.

    Args:
      learning_rate: a number or a schedule.
      rank: columns r of each basis: an int, or a float in (0, 1] as a fraction
        of the matrix' smaller side. Matrices no larger than it get plain Adam.
      update_interval: steps between two moves of the basis.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      scale: alpha, multiplies the part of the update inside of the subspace.
      recovery_scale: multiplies the part outside.
      growth_limit: the part outside may grow by this factor a step; None for
        no limit.
      weight_decay: decoupled, as in `optax.adamw`. With any but the number 0,
        `update` needs the parameters.
      mask: tree of booleans, or a function from parameters to one: which leaves
        decay.
      side: "short" puts each basis on the smaller side of its matrix, "long" on
        the larger.
      dimension_numbers: which leaves are low-rank and which of their axes form
        the matrix; see `LowRank`. None: every leaf of two axes, embeddings and
        heads among them, which the papers leave to plain Adam.
      seed: of the randomized start.
      mu_dtype: dtype of the first moment; None for the parameter's, float32 at
        least.
      monitor: keep each matrix' captured energy and gradient norm in the state,
        for a training loop to report; see `monitor_energy`.
      init: how the first basis is found: "randomized", or "svd" for an exact
        decomposition, which the TPU compiler takes minutes over.
      step_size: None finds the best angle of each move; a number is the paper's
        eta. See `geodesic`.
      damping: in (0, 1], multiplies the best angle.

    Returns:
      The optimizer. Under `optax.inject_hyperparams` name `rank` among the
      static arguments, and any of `mask` and `dimension_numbers` that is a
      function.

    Raises:
      ValueError: if an argument is out of its range, or, on `init`, if no leaf
        is low-rank.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import subtrack_jax as stj
      >>> optimizer = stj.subtrack(1e-2, rank=4, update_interval=10)
      >>> params = {"kernel": jnp.ones((16, 64)), "bias": jnp.ones(64)}
      >>> state = optimizer.init(params)
      >>> grads = jax.grad(lambda p: optax.tree.norm(p, squared=True))(params)
      >>> updates, state = optimizer.update(grads, state, params)
      >>> optax.tree.get(state, "basis")["kernel"].shape
      (16, 4)
      >>> optax.tree.get(state, "mu")["kernel"].shape
      (4, 64)
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = trackers.geodesic(step_size, damping, init)
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        scale_by_projection_aware_adam(low_rank, b1, b2, eps, mu_dtype),
        recover_and_scale(low_rank, scale, "columns", recovery_scale, growth_limit),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )


def subtrack_grad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int | float = 128,
    update_interval: _Scalar = 200,
    b1: _Scalar = 0.9,
    b2: _Scalar = 0.999,
    eps: _Scalar = 1e-8,
    scale: _Scalar = 0.25,
    weight_decay: _Scalar = 0.0,
    mask: Any = None,
    side: Literal["short", "long"] = "short",
    dimension_numbers: Any = None,
    seed: _Scalar = 0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    monitor: bool = False,
    init: Init = "randomized",
    step_size: _Scalar | None = None,
    damping: _Scalar = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """SubTrack (2024): gradient subspace tracking without the ++.

    The first form of the method: the basis turns as in `subtrack`, while
    Adam's moments stay as they are when it does and what the subspace misses is
    dropped (the workshop version of arXiv 2502.01586).

    Args: as in `subtrack`, which has two more for the recovery.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `subtrack`.
    """
    low_rank = LowRank(rank, dimension_numbers, side)
    tracker = trackers.geodesic(step_size, damping, init)
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        scale_by_projection_aware_adam(
            low_rank, b1, b2, eps, mu_dtype, transport=False
        ),
        recover_and_scale(low_rank, scale, "none"),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )
