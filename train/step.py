"""What is compiled: one optimizer step, and the loss of one held-out batch."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import llama
from train.data import Batch


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # (), int32; steps taken so far
    params: Any  # nested dictionaries of arrays
    opt_state: optax.OptState


@functools.partial(jax.jit, static_argnums=(0, 1))
def create_state(
    config: llama.LlamaConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Fresh parameters and optimizer state."""
    model = llama.Llama(config, rngs=nnx.Rngs(key))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def model_definition(config: llama.LlamaConfig) -> nnx.GraphDef[llama.Llama]:
    """The model without its parameters: `nnx.merge` joins them again."""
    return nnx.graphdef(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    definition: nnx.GraphDef[llama.Llama],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step; the state passed in is consumed.

    Returns:
      The new state, and scalars: `loss`, the mean over the batch's tokens before
      the step, in nats; `gradient_norm`, before clipping; `learning_rate`.
    """

    def mean_loss(params):
        sums = llama.token_loss(nnx.merge(definition, params), **batch)
        return sums.loss / sums.count

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": schedule(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics


def evaluate(
    definition: nnx.GraphDef[llama.Llama], params: Any, batches: Iterable[Batch]
) -> float:
    """Total loss of the batches divided by their number of tokens, in nats."""
    sums = [_token_loss(definition, params, batch) for batch in batches]
    totals, counts = zip(*jax.device_get(sums), strict=True)
    return float(sum(totals) / sum(counts))


@functools.partial(jax.jit, static_argnums=0)
def _token_loss(definition, params, batch):
    sums = llama.token_loss(nnx.merge(definition, params), **batch)
    return sums.loss, sums.count
