"""Optimizers by the names of `--optimizer`, and their learning-rate schedules."""

from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import optax

import subtrack_jax as stj
from models.matrices import matrix_axes
from subtrack_jax.optimizers import Method
from train.config.methods import LOW_RANK, fixed, matrix_scale_field, resolved
from train.config.optimizer_config import OptimizerConfig, schedule_phases
from train.step import architectures
from train.step.architectures import Architecture

# Muon's updates are scaled to the size of Adam's (arXiv 2502.16982), so that the same
# learning rates suit both.
MUON_RMS = 0.2


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning-rate schedule: linear warm-up, then constant, or decay to a fraction.

    Raises:
      ValueError: see `schedule_phases`.
    """
    warmup, stable, decay = schedule_phases(config, steps)
    peak = config.learning_rate
    end = peak * config.final_learning_rate_fraction
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(decay, 1), end / peak)
    else:
        after = optax.linear_schedule(peak, end, max(decay, 1), stable)
    # The first step of the warm-up has a rate above zero.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def check_rank(config: OptimizerConfig, model: Architecture) -> None:
    """Raises a ValueError if the rank makes every matrix plain Adam."""
    method = LOW_RANK.get(config.name)
    if method is None or "rank" in fixed(method):
        return
    rank = resolved(config).rank
    if rank < min(model.hidden_size, model.mlp_size):
        return  # the MLP's kernels are larger; checking all of them takes longer
    low_rank = stj.LowRank(rank, matrix_axes)
    choices = low_rank.choices(architectures.abstract_params(model))
    largest = max(each.short_side for each in choices if each.spec is not None)
    if rank >= largest:
        raise ValueError(
            f"--rank {rank} leaves no matrix to --optimizer {config.name}: the largest "
            f"has a smaller side of {largest}. Lower --rank below it, or take "
            "--optimizer adamw"
        )


def make_optimizer(
    config: OptimizerConfig,
    learning_rate: optax.ScalarOrSchedule,
    seed: jax.typing.ArrayLike,
    matrix_scale: jax.typing.ArrayLike | None = None,
    steps: int = 10_000,
) -> optax.GradientTransformation:
    """Builds the optimizer of a model, for clipped gradients.

    Args:
      config: the method and its settings.
      learning_rate: number or schedule; replaces the config's peak.
      seed: seed of random subspaces.
      matrix_scale: replaces the config's `matrix_scale_field`; may be a traced array.
      steps: length of the run, for methods that depend on it.
    """
    config = resolved(config)
    scales = {
        "scale": config.scale,
        "matrix_learning_rate_scale": config.matrix_learning_rate_scale,
    }
    if matrix_scale is not None:
        scales[matrix_scale_field(config.name)] = matrix_scale
    rate_scale = scales["matrix_learning_rate_scale"]
    is_one = isinstance(rate_scale, int | float) and rate_scale == 1
    scale_matrices = () if is_one else (_scale_matrices(rate_scale),)
    method = LOW_RANK.get(config.name)
    if method is not None:
        made = _low_rank(config, method, learning_rate, seed, scales["scale"], steps)
        return made if is_one else optax.chain(made, *scale_matrices)
    return optax.chain(
        _full_rank(config),
        optax.add_decayed_weights(config.weight_decay, _is_decayed),
        *scale_matrices,
        optax.scale_by_learning_rate(learning_rate),
    )


def _low_rank(
    config: OptimizerConfig,
    method: Method,
    learning_rate: optax.ScalarOrSchedule,
    seed: jax.typing.ArrayLike,
    scale: jax.typing.ArrayLike,
    steps: int,
) -> optax.GradientTransformation:
    """Builds a method of the library with the config's settings that it reads."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values |= {
        "scale": scale,
        "monitor": True,
        "random_after_steps": round(config.random_after_fraction * steps),
    }
    if config.projection_learning_rate is not None:
        rate = config.projection_learning_rate
        values["projection_optimizer"] = optax.adam(rate)
    chosen = {name: values[name] for name in method.defaults if name in values}
    if method.recovery is not None:
        chosen["transport"] = config.transport
        chosen["recovery"] = "columns" if config.recovery else "none"
        chosen["growth_limit"] = config.growth_limit
    return method.build(
        learning_rate,
        seed=seed,
        mask=_is_decayed,
        dimension_numbers=matrix_axes,
        **chosen,
    )


def _full_rank(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds Adam, or another rule for matrices with Adam for other parameters."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "adamw":
        return adam
    if config.name == "muon":
        # A rate of -1 keeps the sign; the end of the chain negates it.
        matrices = optax.contrib.muon(
            -1.0,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=matrix_axes,
        )
    else:
        matrices = optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=2),
            optax.clip_by_block_rms(1.0),
        )
    return optax.partition(
        {True: matrices, False: adam}, lambda params: _is_matrix(params)
    )


def _scale_matrices(
    factor: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
    scale = optax.stateless_with_tree_map(lambda g, _: jnp.asarray(factor, g.dtype) * g)
    return optax.masked(scale, _is_matrix)


def _is_matrix(params: Any) -> Any:
    """Mask of the parameters that low-rank methods and Muon update."""
    axes = matrix_axes(params)
    return jax.tree.map(lambda _, spec: spec is not None, params, axes)


def _is_decayed(params: Any) -> Any:
    """Mask of the parameters with weight decay: all but norms and biases."""

    def is_decayed(path: Any, leaf: Any) -> bool:
        del leaf
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(is_decayed, params)
