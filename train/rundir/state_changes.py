"""Changed settings that change the shapes of the optimizer's state."""

import dataclasses
import functools
from typing import Any

import jax

from train.config.optimizer_config import OptimizerConfig
from train.config.run_config import RunConfig
from train.rundir import changes
from train.step import architectures, optimizers
from train.step.train_state import abstract_state


def settings_of_state(config: RunConfig, saved: RunConfig) -> list[str]:
    """Changed settings that make a saved optimizer state incompatible."""
    ours, theirs = config.optimizer, saved.optimizer
    shapes = functools.partial(_state_shapes, saved)
    if shapes(ours) == shapes(theirs):
        return []
    changed = [
        name.removeprefix("optimizer.")
        for name in changes.find(config, saved)
        if name.startswith("optimizer.")
    ]
    incompatible = [
        name
        for name in changed
        if shapes(dataclasses.replace(theirs, **{name: getattr(ours, name)}))
        != shapes(theirs)
    ]
    return [f"optimizer.{name}" for name in incompatible or changed]


def _state_shapes(config: RunConfig, optimizer: OptimizerConfig) -> Any:
    made = optimizers.make_optimizer(optimizer, 1.0, config.seed, steps=config.steps)
    params = architectures.abstract_params(config.model)
    try:
        leaves, structure = jax.tree.flatten(abstract_state(params, made))
    except ValueError:  # the rank is too large for every matrix
        return None
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
