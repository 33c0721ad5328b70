"""State of a training run: step counts, parameters and optimizer state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    step: jax.Array  # (), int32; batches so far
    skipped_steps: jax.Array  # (), int32; batches skipped, see `train_step`
    params: Any  # nested dictionaries of arrays
    opt_state: optax.OptState


def initial_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))


def abstract_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, from those of the parameters."""
    return jax.eval_shape(lambda params: initial_state(params, optimizer), params)
