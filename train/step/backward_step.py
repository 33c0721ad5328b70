"""Compiled training step that updates each layer in the backward pass."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import subtrack_jax as stj
from train.step.train_state import TrainState
from train.step.train_step import Batch, LossSums, TrainStep, finish_step


class LayeredLoss(NamedTuple):
    """A loss as functions before, of and after the stacked layers of a model.

    `outside` are the parameters without `layers`.

    Attributes:
      before: (outside, batch) -> activations.
      layer: (parameters of one layer, activations, batch) -> activations.
      after: (outside, activations, batch) -> sums.
      count: batch -> the sums' `count`.
    """

    before: Callable[[Any, Batch], jax.Array]
    layer: Callable[[Any, jax.Array, Batch], jax.Array]
    after: Callable[[Any, jax.Array, Batch], LossSums]
    count: Callable[[Batch], jax.Array]


def make_backward_step(
    loss: LayeredLoss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    gradient_accumulation_steps: int = 1,
    state_shardings: TrainState | None = None,
    max_gradient_norm: float = math.inf,
) -> TrainStep:
    """Compiles a step with the state, results and metrics of `make_train_step`.

    The gradient of one layer is in memory at a time. A step whose loss is not finite
    changes nothing and counts as skipped. So does one whose gradient is not finite,
    except that without clipping the layers above keep their updates.

    Args:
      loss: the loss, without dropout.
      optimizer: the optimizer; see `stj.update_in_backward` for those refused.
      schedule: as in `make_train_step`, as are the others.
      gradient_accumulation_steps: micro-batches of each layer.
      state_shardings: shardings of the new state; None: the compiler's choice.
      max_gradient_norm: gradients are scaled down to this global norm, in a second
        backward pass.

    Returns:
      The step.
    """

    def after(outside, x, batch):
        sums = loss.after(outside, x, batch)
        return sums.total, {"loss": sums.total} | sums.other

    update = stj.update_in_backward(
        optimizer,
        loss.before,
        loss.layer,
        after,
        parts=gradient_accumulation_steps,
        max_gradient_norm=max_gradient_norm,
        has_aux=True,
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
    def train_step(state: TrainState, batch: Batch):
        count = loss.count(batch)
        weight = 1 / jnp.maximum(count, 1)
        done = update(state.params, state.opt_state, batch, weight)
        metrics = {name: weight * each for name, each in done.aux.items()}
        metrics |= {"count": count, "gradient_norm": done.gradient_norm}
        return finish_step(
            state, done.params, done.opt_state, done.applied, schedule, metrics
        )

    return train_step
