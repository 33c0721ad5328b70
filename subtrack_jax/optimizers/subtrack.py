"""SubTrack++, and how to build what is not in the family yet.

Each member of the family is a choice of tracker, transport and recovery:

| optimizer                 | tracker                    | moments     | at last  |
|---------------------------|----------------------------|-------------|----------|
| `subtrack`                | `geodesic`                 | transported | recovers |
| `subtrack_grad`           | `geodesic`                 | kept        | lifts    |
| `grass_walk`              | `random_walk`              | transported | recovers |
| `grass_jump`              | `random_jump`              | transported | recovers |
| `galore`                  | `svd`                      | kept        | lifts    |
| `golore`                  | `switch(svd, random_jump)` | mean turned | lifts    |
| `fira`                    | `svd`                      | kept        | recovers |
| `ldadam`                  | `power_iteration`          | transported | lifts    |
| `online_subspace_descent` | `online_pca`               | kept        | lifts    |
| `apollo`, `apollo_mini`   | none: `draw_projection`    | kept        | scales G |

All are chains of the same stages. Written out, this is `subtrack`, to the last
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

A new method is a new choice. This one follows the whole tangent where `subtrack`
follows its strongest direction, with Lion inside of the subspace:

  >>> import jax.numpy as jnp
  >>> def steepest(angle):
  ...     def move(gradient, basis, context):
  ...         tangent = stj.grassmann.tangent(basis, gradient)
  ...         length = jnp.linalg.norm(tangent)
  ...         tangent *= angle / jnp.where(length > 0, length, 1)
  ...         return stj.Moved(stj.grassmann.exponential_map(basis, tangent))
  ...     return stj.geodesic()._replace(move=move)
  >>> def steepest_lion(learning_rate, rank, update_interval=50):
  ...     low_rank = stj.LowRank(rank)
  ...     lion = optax.scale_by_lion()
  ...     return optax.chain(
  ...         stj.track_subspace(low_rank, steepest(0.1), update_interval),
  ...         stj.project(low_rank),
  ...         stj.on_coordinates(low_rank, lion, stj.transport_momentum),
  ...         stj.recover_and_scale(low_rank, recovery="none"),
  ...         optax.scale_by_learning_rate(learning_rate),
  ...     )

It trains, in any wrapper of optax and on any mesh:

  >>> import jax
  >>> target = jnp.outer(jnp.arange(16.0), jnp.sin(jnp.arange(64.0)))
  >>> loss = lambda params: jnp.mean((params - target) ** 2)
  >>> optimizer = steepest_lion(1.0, rank=4, update_interval=5)
  >>> params = jnp.zeros_like(target)
  >>> state, start = optimizer.init(params), loss(params)
  >>> step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p))
  >>> for _ in range(100):
  ...     updates, state = step(params, state)
  ...     params = optax.apply_updates(params, updates)
  >>> bool(loss(params) < start / 10)
  True
"""

from typing import Any, Literal

import jax
import optax

from subtrack_jax._internal.injection import with_values_as_operands
from subtrack_jax.low_rank import LowRank
from subtrack_jax.optimizers.chains import assemble
from subtrack_jax.stages import trackers
from subtrack_jax.stages.adam import scale_by_projection_aware_adam
from subtrack_jax.stages.recover import recover_and_scale
from subtrack_jax.stages.track import track_subspace
from subtrack_jax.stages.tracker import Init

_Scalar = jax.typing.ArrayLike


@with_values_as_operands
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
    moments_dtype: Literal["int8"] | None = None,
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
      update_interval: steps between two moves of the basis, below 2^31.
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
      seed: of the randomized start, an int of 32 bits.
      mu_dtype: dtype of the first moment; None for the parameter's, float32 at
        least; "int8" is an older spelling of `moments_dtype="int8"`.
      moments_dtype: "int8" for both moments in eight bits, block by block.
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
      function; with parameters in 16 bits, in which b2 = 0.999 would be 1, also
      pass it `hyperparam_dtype=jnp.float32`. Updates leave in the wider dtype of
      gradient and parameter, if `update` is given the parameters. `update` has
      derivatives in forward and reverse mode; second ones in forward mode over
      reverse mode (`jax.jvp` of `jax.grad`), as not all of its parts can be
      reversed twice.

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
        scale_by_projection_aware_adam(
            low_rank, b1, b2, eps, mu_dtype, moments_dtype=moments_dtype
        ),
        recover_and_scale(low_rank, scale, "columns", recovery_scale, growth_limit),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )


@with_values_as_operands
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
    moments_dtype: Literal["int8"] | None = None,
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
    adam = scale_by_projection_aware_adam(
        low_rank, b1, b2, eps, mu_dtype, transport=False, moments_dtype=moments_dtype
    )
    return assemble(
        low_rank,
        track_subspace(low_rank, tracker, update_interval, seed),
        adam,
        recover_and_scale(low_rank, scale, "none"),
        end=(weight_decay, mask, learning_rate),
        monitor=monitor,
    )
