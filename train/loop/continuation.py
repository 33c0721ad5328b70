"""Continuing a run whose settings have changed since its checkpoint was written."""

import dataclasses
import functools
from typing import Any

import grain
import jax

from models import llama
from train.config.optimizer_config import OptimizerConfig
from train.config.pretrain_config import PretrainConfig
from train.config.rules import flag
from train.data.dataset import Text
from train.data.packing import Batch
from train.rundir import changes
from train.rundir.checkpoints import Checkpoints
from train.rundir.directory import Found
from train.step import optimizers
from train.step.train_state import TrainState, abstract_state


def settings_of_state(config: PretrainConfig, saved: PretrainConfig) -> list[str]:
    """The settings because of which an optimizer cannot take over a saved state."""
    ours, theirs = config.optimizer, saved.optimizer
    shapes = functools.partial(_state_shapes, saved)
    if shapes(ours) == shapes(theirs):
        return []
    changed = [
        name.removeprefix("optimizer.")
        for name in changes.find(config, saved)
        if name.startswith("optimizer.")
    ]
    guilty = [
        name
        for name in changed
        if shapes(dataclasses.replace(theirs, **{name: getattr(ours, name)}))
        != shapes(theirs)
    ]
    return [f"optimizer.{name}" for name in guilty or changed]


def _state_shapes(config: PretrainConfig, optimizer: OptimizerConfig) -> Any:
    made = optimizers.make_optimizer(optimizer, 1.0, config.seed, steps=config.steps)
    params = llama.abstract_params(config.model)
    try:
        leaves, structure = jax.tree.flatten(abstract_state(params, made))
    except ValueError:  # of a rank that no matrix of this model takes
        return None
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def restore(
    checkpoints: Checkpoints,
    abstract: TrainState,
    text: Text,
    found: Found | None,
    **options: Any,
) -> tuple[TrainState | None, grain.DatasetIterator[Batch]]:
    """The newest checkpoint that is sound, and batches that go on after it.

    Where a change has put other rows in the place of those that were read, the
    training text is read from its beginning again. Batches of another size go on with
    the first row that was not read, or up to a batch before it.

    Args:
      checkpoints: where to read.
      abstract: shapes, dtypes and shardings of the state.
      text: what to read batches of.
      found: the run that has the checkpoints, and changes since; None for a new one.
      **options: of `Checkpoints.restore`, which also says what is raised.
    """
    batches = text.train_batches()
    changed = found.changes if found else {}
    if found and found.has_other_rows:
        return checkpoints.restore(abstract, _Unmoved(), **options), batches
    state = checkpoints.restore(abstract, batches, **options)
    if state is not None and (change := changed.get("data.batch_size_sequences")):
        position, (before, now) = batches.get_state(), change
        if "next_index" in position:  # counts batches; a stream's counts documents
            index = position["next_index"] * before // now
            batches.set_state(position | {"next_index": index})
    return state, batches


class _Unmoved:
    """Stands for batches that are not set to where a checkpoint left them."""

    def set_state(self, state: Any) -> None:
        """Does nothing."""


def describe(config: PretrainConfig, found: Found, state: TrainState) -> str:
    """Lists the settings that change from a step on, a line each; empty if none do.

    Args:
      config: the run.
      found: what has changed of it.
      state: after the last step of before.
    """
    lines = [
        f"Changed    {flag(name)} from {before} to {now}"
        for name, (before, now) in found.changes.items()
        if name != "output_dir"
    ]
    if "steps" in found.changes:
        before, now = found.changes["steps"]
        line = (
            f"           The schedule is that of {now:,} steps from here on: the "
            f"learning rate of step {int(state.step) + 1:,} is {_rate(config, state)}"
        )
        if not any(name.startswith("optimizer.") for name in found.changes):
            rate = _rate(dataclasses.replace(config, steps=before), state)
            line += f"; with {before:,} steps it would be {rate}"
        lines.append(line)
    if found.has_other_rows:
        lines.append(
            "           The training text is read from its beginning again, because "
            "other rows are in the place of those that were read"
        )
    if found.has_other_evaluation:
        lines.append(
            "           Held-out losses are of another text from here on, and the best "
            "checkpoint is one of those to come"
        )
    return "\n".join(lines)


def _rate(config: PretrainConfig, state: TrainState) -> str:
    """The learning rate of the step after a state."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    return f"{float(schedule(state.step - state.skipped_steps)):.3g}"
