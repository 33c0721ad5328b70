"""Compiled functions: one optimizer step, and the loss of one held-out batch."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models import llama
from subtrack_jax._internal.loops import apply_if
from train.data.dataset import Batch


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # (), int32; batches seen so far
    skipped_steps: jax.Array  # (), int32; those of them that changed nothing
    params: Any  # nested dictionaries of arrays
    opt_state: optax.OptState


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@functools.partial(jax.jit, static_argnums=(0, 1))
def create_state(
    config: llama.LlamaConfig, optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Fresh parameters and optimizer state."""
    model = llama.Llama(config, rngs=nnx.Rngs(key))
    return create_state_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer)


@functools.partial(jax.jit, static_argnums=1)
def create_state_of(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Given parameters and a fresh optimizer state."""
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))


def model_definition(config: llama.LlamaConfig) -> nnx.GraphDef[llama.Llama]:
    """The model without its parameters: `nnx.merge` joins them again."""
    return nnx.graphdef(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))))


def make_train_step(
    definition: nnx.GraphDef[llama.Llama],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    gradient_accumulation_steps: int = 1,
    z_loss_weight: float = 0.0,
    state_shardings: TrainState | None = None,
    max_gradient_norm: float = math.inf,
) -> TrainStep:
    """Compiles the step; it consumes the state it is given.

    A step whose loss or gradient is not finite leaves parameters and optimizer as
    they were, and counts as skipped.

    Args:
      definition: the model, from `model_definition`.
      optimizer: the optimizer.
      schedule: its learning rate over the steps that were not skipped, to report.
      gradient_accumulation_steps: parts of a batch that are computed one after
        another; the batch size must be a multiple of it.
      z_loss_weight: weight of the squared log-partition in what is minimised.
      state_shardings: where the new state belongs; None: wherever the compiler puts
        it.
      max_gradient_norm: gradients are scaled down to this global norm.

    Returns:
      The step: (state, batch) -> (new state, metrics). The metrics are scalars:
      `loss`, the mean cross-entropy over the batch's tokens before the step, in
      nats; `batch_tokens`, the number of them; `gradient_norm`, before clipping;
      `learning_rate`; `skipped_steps`, so far; and what `subspace_metrics` finds.
    """

    def weighed(params, batch, weight):
        losses = llama.token_loss(nnx.merge(definition, params), **batch)
        total = losses.loss + z_loss_weight * losses.squared_log_z
        return weight * total, weight * losses.loss

    gradient_of = jax.grad(weighed, has_aux=True)

    def mean_gradient(params, batch):
        """Mean over all tokens together, however many each part has."""
        weight = 1 / jnp.maximum(jnp.sum(batch["mask"]), 1)
        parts = gradient_accumulation_steps
        if parts == 1:
            return gradient_of(params, batch, weight)

        def add(carry, part):
            gradients, loss = gradient_of(params, part, weight)
            wide = jax.tree.map(lambda total, g: total + g, carry[0], gradients)
            return (wide, carry[1] + loss), None

        # Neighbours go to different parts, so that a batch split over devices stays
        # split in each; sums of small parts need more digits than bfloat16 has.
        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
            params,
        )
        split = jax.tree.map(
            lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
        (gradients, loss), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), split)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params), loss

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(state_shardings, None))
    def train_step(state: TrainState, batch: Batch):
        gradients, loss = mean_gradient(state.params, batch)
        norm = optax.tree.norm(optax.tree.cast(gradients, jnp.float32))
        factor = jnp.minimum(max_gradient_norm / norm, 1)

        def update(carry):
            params, opt_state = carry
            clipped = jax.tree.map(
                lambda g: (factor * g.astype(jnp.float32)).astype(g.dtype), gradients
            )
            updates, opt_state = optimizer.update(clipped, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        # Not a select over the results, which would keep all that was before.
        params, opt_state = apply_if(
            is_finite, update, (state.params, state.opt_state), "update"
        )
        skipped_steps = state.skipped_steps + ~is_finite
        metrics = {
            "loss": loss,
            "batch_tokens": jnp.sum(batch["mask"]),
            "gradient_norm": norm,
            "learning_rate": schedule(state.step - state.skipped_steps),
            "skipped_steps": skipped_steps,
        }
        metrics |= subspace_metrics(opt_state)
        return TrainState(state.step + 1, skipped_steps, params, opt_state), metrics

    return train_step


def subspace_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """How the subspaces of a monitored low-rank optimizer fit the last gradient.

    Returns:
      `captured_energy`, the share of the squared norm of all low-rank gradients
      that lies within their subspaces; `recovery_ratio`, |Lambda| / |G|, the norm
      of what was recovered from outside of them over that of the gradients.
      Nothing for optimizers without.
    """

    def squares(name):
        values = optax.tree.get(opt_state, name, default=())
        return [leaf * leaf for leaf in jax.tree.leaves(values)]

    def total(values):
        return sum(jnp.sum(value) for value in values)

    energies, recovered = squares("gradient_norm"), squares("recovery_norm")
    if not energies:
        return {}
    captured = jax.tree.leaves(optax.tree.get(opt_state, "captured_energy"))
    inside = [c * e for c, e in zip(captured, energies, strict=True)]
    everything = jnp.maximum(total(energies), jnp.finfo(jnp.float32).tiny)
    metrics = {"captured_energy": total(inside) / everything}
    if recovered:
        metrics["recovery_ratio"] = jnp.sqrt(total(recovered) / everything)
    return metrics


def evaluate(
    definition: nnx.GraphDef[llama.Llama], params: Any, batches: Iterable[Batch]
) -> float:
    """Total loss of the batches divided by their number of tokens, in nats."""
    return begin_evaluation(definition, params, batches)()


def begin_evaluation(
    definition: nnx.GraphDef[llama.Llama], params: Any, batches: Iterable[Batch]
) -> Callable[[], float]:
    """Dispatches an evaluation; the function that is returned waits for its result."""
    sums = [_token_loss(definition, params, batch) for batch in batches]

    def finish() -> float:
        totals, counts = zip(*jax.device_get(sums), strict=True)
        return float(sum(totals) / sum(counts))

    return finish


@functools.partial(jax.jit, static_argnums=0)
def _token_loss(definition, params, batch):
    losses = llama.token_loss(nnx.merge(definition, params), **batch)
    return losses.loss, losses.count
