"""Resuming a run with changed settings: state, position in the data, messages."""

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


def _state_shapes(config: PretrainConfig, optimizer: OptimizerConfig) -> Any:
    made = optimizers.make_optimizer(optimizer, 1.0, config.seed, steps=config.steps)
    params = llama.abstract_params(config.model)
    try:
        leaves, structure = jax.tree.flatten(abstract_state(params, made))
    except ValueError:  # the rank is too large for every matrix
        return None
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def restore(
    checkpoints: Checkpoints,
    abstract: TrainState,
    text: Text,
    found: Found | None,
    **options: Any,
) -> tuple[TrainState | None, grain.DatasetIterator[Batch]]:
    """Restores the newest undamaged checkpoint and the position in the data.

    If changed settings give other rows, the training text is read from its beginning
    again. With another batch size, reading continues at the first unread row, or up to
    a batch before it.

    Args:
      checkpoints: the run's checkpoints.
      abstract: shapes, dtypes and shardings of the state.
      text: the text to read.
      found: the run to resume, with its changes; None for a new run.
      **options: options of `Checkpoints.restore`, which lists the errors.
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
    """Iterator stand-in that ignores a checkpoint's position in the data."""

    def set_state(self, state: Any) -> None:
        """Does nothing."""


def describe(config: PretrainConfig, found: Found, state: TrainState) -> str:
    """Formats the changed settings of a resumed run, one per line; "" if none.

    Args:
      config: the run.
      found: its changes.
      state: the restored state.
    """
    lines = [
        f"Changed    {flag(name)} from {before} to {now}"
        for name, (before, now) in found.changes.items()
        if name != "output_dir"
    ]
    if "steps" in found.changes:
        before, now = found.changes["steps"]
        line = (
            f"           The schedule is now that of {now:,} steps: the learning rate "
            f"of step {int(state.step) + 1:,} is {_rate(config, state)}"
        )
        if not any(name.startswith("optimizer.") for name in found.changes):
            rate = _rate(dataclasses.replace(config, steps=before), state)
            line += f"; with {before:,} steps it would be {rate}"
        lines.append(line)
    if found.has_other_rows:
        lines.append(
            "           The training text is read from its beginning again, because "
            "its rows have changed"
        )
    if found.has_other_evaluation:
        lines.append(
            "           Held-out losses are of another text from now on; earlier ones "
            "no longer count for the best checkpoint"
        )
    return "\n".join(lines)


def _rate(config: PretrainConfig, state: TrainState) -> str:
    """Learning rate of the next step, formatted."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    return f"{float(schedule(state.step - state.skipped_steps)):.3g}"
