"""The optimizers by the names that `--optimizer` takes."""

from typing import Any

import jax
import optax

import subtrack_jax as stj
from models import llama
from train.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to a fraction of it."""
    warmup_steps = round(config.warmup_fraction * steps)
    return optax.warmup_cosine_decay_schedule(
        # The first of the warm-up's steps already moves.
        init_value=config.learning_rate / (warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),
        end_value=config.learning_rate * config.final_learning_rate_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule, seed: int
) -> optax.GradientTransformation:
    """The optimizer of a LLaMA, behind clipping by global norm.

    Args:
      config: the method and its settings.
      learning_rate: replaces the config's peak; a number or a schedule of it.
      seed: for methods that draw random subspaces.
    """
    adam = {
        "b1": config.b1,
        "b2": config.b2,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "mask": _not_a_norm,
    }
    low_rank = adam | {
        "rank": config.rank,
        "update_interval": config.update_interval,
        "scale": config.scale,
        "dimension_numbers": llama.matrix_axes,
        "seed": seed,
        "monitor": True,
    }
    recovering = low_rank | {"growth_limit": config.growth_limit}
    geodesic = {"step_size": config.step_size}
    factory, settings = {
        "adamw": (optax.adamw, adam),
        "subtrack": (stj.subtrack, recovering | geodesic),
        "subtrack-grad": (stj.subtrack_grad, low_rank | geodesic),
        "grass-walk": (stj.grass_walk, recovering),
        "grass-jump": (stj.grass_jump, recovering),
        "galore": (stj.galore, low_rank),
    }[config.name]
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        factory(learning_rate, **settings),
    )


def _not_a_norm(params: Any) -> Any:
    """True for the parameters that weight decay acts on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )
