"""Resuming a run with changed settings: state, position in the data, messages."""

import dataclasses
from collections.abc import Callable
from typing import Any

import grain

from train.config.rules import flag
from train.config.run_config import RunConfig
from train.rundir.checkpoints import Checkpoints
from train.rundir.directory import Found
from train.step import optimizers
from train.step.train_state import TrainState


def restore(
    checkpoints: Checkpoints,
    abstract: TrainState,
    train_batches: Callable[[], grain.DatasetIterator],
    found: Found | None,
    **options: Any,
) -> tuple[TrainState | None, grain.DatasetIterator]:
    """Restores the newest undamaged checkpoint and the position in the data.

    If changed settings give other rows, the training text is read from its beginning
    again. With another batch size, reading continues at the first unread row, or up to
    a batch before it.

    Args:
      checkpoints: the run's checkpoints.
      abstract: shapes, dtypes and shardings of the state.
      train_batches: opens the training batches at their beginning.
      found: the run to resume, with its changes; None for a new run.
      **options: options of `Checkpoints.restore`, which lists the errors.
    """
    batches = train_batches()
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


def describe(config: RunConfig, found: Found, state: TrainState) -> str:
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


def _rate(config: RunConfig, state: TrainState) -> str:
    """Learning rate of the next step, formatted."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    return f"{float(schedule(state.step - state.skipped_steps)):.3g}"
