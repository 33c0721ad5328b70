"""Per-layer updates in the backward pass: one layer's gradient in memory at a time.

Lv et al. 2023 (LOMO, arXiv 2306.09782) and Zhao et al. 2024 (GaLore, arXiv 2403.03507,
section 4.4) update each parameter as soon as its gradient is known. Ours: a reverse
loop over the stacked layers of a JAX model, for any optimizer, with exact gradient
accumulation and clipping.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from subtrack_jax._internal.backward_step import BackwardStep, BackwardUpdate
from subtrack_jax._internal.layered_model import LayeredModel
from subtrack_jax._internal.stacked_state import StackedState
from subtrack_jax._internal.validation import check, check_steps


def update_in_backward(
    optimizer: optax.GradientTransformation,
    before: Callable[[Any, Any], jax.Array],
    layer: Callable[[Any, jax.Array, Any], jax.Array],
    after: Callable[[Any, jax.Array, Any], Any],
    *,
    stack: str = "layers",
    parts: int = 1,
    max_gradient_norm: float = math.inf,
    has_aux: bool = False,
) -> Callable[..., BackwardUpdate]:
    """Training step that updates each layer in the backward pass.

    The gradient of one layer exists at a time, never that of the model. The result
    is that of the ordinary step, up to rounding, with the ordinary state: of
    `optimizer.init(params)`. Either step can follow the other at any time.

    The model is `after(rest, layers(before(rest, batch), batch), batch)`, with layers
    of equal shapes, whose parameters are stacked on a leading axis under one key of
    `params`; `rest` are the parameters under all other keys. Activations between
    layers are saved, those inside of a layer are computed again (as
    `jax.checkpoint` of each layer does).

    - Accumulation: a batch is cut into `parts`. Every layer sums its gradient over
      all parts before its update, in float32. Saved are the activations between layers
      of the whole batch, where ordinary accumulation keeps a gradient of the model.
    - Clipping by the global norm is exact. The norm is known only after a backward
      pass, so that a second one follows: at most 1.75 times the computation.
      `optax.clip_by_global_norm` in the optimizer is refused.
    - A value that is not finite changes nothing, nor does a gradient when clipping.
      Without clipping, a gradient that is not finite stops its own update and those of
      layers below, not those already made.
    - Rules that look at a stacked leaf as one (block RMS, trust ratios, Muon on a stack
      of vectors) see one layer at a time, as if layers were leaves of their own.

    Args:
      optimizer: any optax transformation, except those that look at the gradients of
        all layers (`optax.apply_if_finite`, `optax.contrib.prodigy`).
      before: from `rest` and a part of the batch to activations, a tree of arrays.
      layer: from one layer's parameters, activations and a part of the batch to
        activations of the same types.
      after: from `rest`, the last activations and a part of the batch to the value
        to minimise, a scalar that is summed over the parts; with `has_aux`, and a
        tree of arrays.
      stack: key of the stacked layers in `params`.
      parts: number of parts of a batch, computed sequentially; each leaf's leading
        axis must be a multiple of it.
      max_gradient_norm: gradients are scaled down to this global norm.
      has_aux: whether `after` returns a pair.

    Returns:
      `step(params, opt_state, batch, weight=1.0) -> BackwardUpdate`, to be jitted with
      donated parameters and state: `jax.jit(step, donate_argnums=(0, 1))`. The value
      minimised is `weight` times the sum over the parts, such as a sum of losses with
      one over the number of tokens. The step raises a ValueError when traced if
      parameters or optimizer do not fit.

    Raises:
      ValueError: if `parts` or `max_gradient_norm` is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import subtrack_jax as stj
      >>> params = {
      ...     "embedding": jnp.ones((16, 8)),
      ...     "layers": {"kernel": jnp.ones((3, 8, 8)) / 8},
      ...     "head": jnp.ones((8, 1)),
      ... }
      >>> optimizer = stj.subtrack(
      ...     1e-2, rank=4, dimension_numbers=stj.by_path("layers.*kernel")
      ... )
      >>> step = stj.update_in_backward(
      ...     optimizer,
      ...     before=lambda rest, batch: rest["embedding"][batch["inputs"]],
      ...     layer=lambda own, x, batch: x + jnp.tanh(x @ own["kernel"]),
      ...     after=lambda rest, x, batch: jnp.sum(
      ...         (x @ rest["head"] - batch["targets"]) ** 2
      ...     ),
      ... )
      >>> batch = {"inputs": jnp.arange(4), "targets": jnp.ones((4, 1))}
      >>> step = jax.jit(step, donate_argnums=(0, 1))
      >>> done = step(params, optimizer.init(params), batch, 1 / 4)
      >>> f"{done.value:.2f}", done.params["layers"]["kernel"].shape
      ('815.84', (3, 8, 8))
    """
    check_steps("parts", parts, least=1)
    check("max_gradient_norm", max_gradient_norm, lambda x: x > 0, "a positive number")
    with_aux = after if has_aux else lambda *args: (after(*args), None)
    model = LayeredModel(before, layer, with_aux, parts)

    def step(params, opt_state, batch, weight=1.0):
        state = StackedState(optimizer, params, stack)
        return BackwardStep(model, state, stack, max_gradient_norm)(
            params, opt_state, batch, weight
        )

    return step
