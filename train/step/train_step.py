"""Compiled functions: one optimizer step, and the mean loss of held-out batches."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.step.train_state import TrainState

# Arrays whose first axis is the batch's, by name.
Batch = Any


class LossSums(NamedTuple):
    """Loss sums over the tokens or examples of a batch, scalars.

    Attributes:
      total: float32; the sum to minimise.
      count: int32; number of tokens or examples.
      other: float32; further sums to report, by name. `loss` is reported, and
        evaluated, in place of the total.
    """

    total: jax.Array
    count: jax.Array
    other: dict[str, jax.Array]


# (parameters, batch, key for dropout) -> sums; hashable, so that it compiles once.
LossFunction = Callable[[Any, Batch, jax.Array], LossSums]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    loss_sums: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    gradient_accumulation_steps: int = 1,
    state_shardings: TrainState | None = None,
    max_gradient_norm: float = math.inf,
    seed: int = 0,
    *,
    separate_update: bool = False,
) -> TrainStep:
    """Compiles the training step, which donates its state.

    The gradient is that of total / count of the whole batch, whatever each
    micro-batch holds. A step whose loss or gradient is not finite leaves parameters
    and optimizer as they were, and counts as skipped.

    Args:
      loss_sums: the loss.
      optimizer: the optimizer.
      schedule: its learning rate over the steps that were not skipped, to report.
      gradient_accumulation_steps: micro-batches that are computed sequentially; the
        batch size must be a multiple of it.
      state_shardings: shardings of the new state; None: the compiler's choice.
      max_gradient_norm: gradients are scaled down to this global norm.
      seed: seed of the loss's keys, one per step and micro-batch.
      separate_update: compile gradient and update apart, so that batches of several
        shapes compile the update once.

    Returns:
      The step: (state, batch) -> (new state, metrics). The metrics are scalars:
      `loss` and other means over the batch before the step; `count`, its tokens or
      examples; `gradient_norm`, before clipping; `learning_rate`; `skipped_steps`, so
      far; and those of `subspace_metrics`.
    """
    parts = gradient_accumulation_steps

    def compute(params, step, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), step)
        if parts == 1:
            return _gradient(loss_sums, params, batch, key)
        return _accumulated_gradient(loss_sums, params, batch, key, parts)

    def apply(state: TrainState, gradients, means, count):
        norm = optax.tree.norm(optax.tree.cast(gradients, jnp.float32))
        factor = jnp.minimum(max_gradient_norm / norm, 1)

        def update(carry):
            params, opt_state = carry
            clipped = jax.tree.map(
                lambda g: (factor * g.astype(jnp.float32)).astype(g.dtype), gradients
            )
            updates, opt_state = optimizer.update(clipped, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        is_finite = jnp.isfinite(means["loss"]) & jnp.isfinite(norm)
        # A loop of at most one trip: a conditional would copy the state that it passes
        # through, a select would keep old and new state in memory.
        with jax.named_scope("update"):
            _, (params, opt_state) = jax.lax.while_loop(
                lambda carry: carry[0],
                lambda carry: (jnp.zeros_like(carry[0]), update(carry[1])),
                (is_finite, (state.params, state.opt_state)),
            )
        metrics = means | {"count": count, "gradient_norm": norm}
        return finish_step(state, params, opt_state, is_finite, schedule, metrics)

    compiled = functools.partial(
        jax.jit, donate_argnums=0, out_shardings=(state_shardings, None)
    )
    if separate_update:
        own = (state_shardings and state_shardings.params, None, None)
        return SeparateStep(jax.jit(compute, out_shardings=own), compiled(apply))

    def train_step(state: TrainState, batch: Batch):
        return apply(state, *compute(state.params, state.step, batch))

    return compiled(train_step)


def finish_step(
    state: TrainState,
    params: Any,
    opt_state: optax.OptState,
    applied: jax.Array,
    schedule: optax.Schedule,
    metrics: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Counts a step, and adds the metrics of its state.

    Args:
      state: the state before the step.
      params: the new parameters.
      opt_state: the new state of the optimizer.
      applied: scalar bool, False for a step that was skipped.
      schedule: the learning rate.
      metrics: metrics of the batch and its gradient.

    Returns:
      The new state, and all metrics.
    """
    skipped_steps = state.skipped_steps + ~applied
    metrics |= {
        "learning_rate": schedule(state.step - state.skipped_steps),
        "skipped_steps": skipped_steps,
    }
    metrics |= subspace_metrics(opt_state)
    return TrainState(state.step + 1, skipped_steps, params, opt_state), metrics


@dataclasses.dataclass(frozen=True)
class SeparateStep:
    """Training step in two compiled functions.

    Attributes:
      compute: (parameters, step, batch) -> gradients, means of the losses, count;
        compiled for each shape of batches.
      apply: (state, gradients, means, count) -> (new state, metrics); compiled once.
    """

    compute: Callable[..., Any]
    apply: Callable[..., tuple[TrainState, dict[str, jax.Array]]]

    def __call__(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Takes a step; the state is donated."""
        return self.apply(state, *self.compute(state.params, state.step, batch))

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Traces and lowers the gradient."""
        return self.compute.lower(state.params, state.step, batch)


def _gradient(
    loss_sums: LossFunction,
    params: Any,
    batch: Batch,
    key: jax.Array,
    count: jax.Array | None = None,
) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """Gradient of total / count, the means of all sums, and the count.

    Args:
      loss_sums: the loss.
      params: the parameters.
      batch: a batch, or a part of one.
      key: for dropout.
      count: count of all parts of the batch; None: this batch's own.
    """

    def total(params):
        sums = loss_sums(params, batch, key)
        return sums.total, sums

    _, backward, sums = jax.vjp(total, params, has_aux=True)
    count = sums.count if count is None else count
    weight = 1 / jnp.maximum(count, 1)
    (gradients,) = backward(weight)
    reported = {"loss": sums.total} | sums.other
    return gradients, {name: weight * each for name, each in reported.items()}, count


def _accumulated_gradient(
    loss_sums: LossFunction, params: Any, batch: Batch, key: jax.Array, parts: int
) -> tuple[Any, dict[str, jax.Array], jax.Array]:
    """`_gradient` of a batch, computed sequentially in parts."""
    whole = loss_sums(params, batch, key)  # the compiler drops all but the count
    count = whole.count

    def add(totals, inputs):
        part, index = inputs
        own = jax.random.fold_in(key, index)
        found = _gradient(loss_sums, params, part, own, count)[:2]
        return jax.tree.map(jnp.add, totals, found), None

    # Strided, so that each part stays sharded over all devices.
    split = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )
    # float32: sums of many parts need more digits than bfloat16 has.
    zeros = jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )
    no_means = dict.fromkeys(["loss", *whole.other], jnp.float32(0))
    (gradients, means), _ = jax.lax.scan(
        add, (zeros, no_means), (split, jnp.arange(parts))
    )
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)
    return gradients, means, count


def subspace_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Fit of a monitored low-rank optimizer's subspaces to the last gradient.

    Returns:
      `captured_energy`, the share of the squared norm of all low-rank gradients
      that lies within their subspaces; `recovery_ratio`, |Lambda| / |G|, the norm
      of what was recovered from outside of them over that of the gradients. Empty
      for other optimizers.
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


def evaluate(loss_sums: LossFunction, params: Any, batches: Iterable[Batch]) -> float:
    """Mean loss over all counted tokens or examples of the batches."""
    return begin_evaluation(loss_sums, params, batches)()


def begin_evaluation(
    loss_sums: LossFunction, params: Any, batches: Iterable[Batch]
) -> Callable[[], float]:
    """Dispatches an evaluation; the returned function waits for its result."""
    sums = [_loss_and_count(loss_sums, params, batch) for batch in batches]

    def finish() -> float:
        totals, counts = zip(*jax.device_get(sums), strict=True)
        return float(sum(totals) / sum(counts))

    return finish


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_count(loss_sums, params, batch):
    sums = loss_sums(params, batch, jax.random.key(0))
    return sums.other.get("loss", sums.total), sums.count
