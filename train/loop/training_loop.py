"""Training loop: dispatch a step, then fetch the metrics of the one before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax

from train.config.run_config import RunConfig
from train.loop import continuation
from train.loop.journal import Journal
from train.loop.subspace_report import Diagnostics
from train.rundir.checkpoints import Checkpoints
from train.rundir.directory import Found
from train.step.setup import TrainSetup
from train.step.throughput import Counted
from train.step.train_state import TrainState
from train.step.train_step import Batch
from train.system import console, processes
from train.system.interruption import Interruption

# Dispatches an evaluation of parameters; the result waits for its metrics.
BeginEvaluation = Callable[[Any], Callable[[], dict[str, float]]]
Row = dict[str, Any]


class Finished(NamedTuple):
    """End of a training loop.

    Attributes:
      state: the last state.
      rows: all rows of metrics.jsonl.
      interruption: the signal that stopped the run before its last step, or None.
    """

    state: TrainState
    rows: list[Row]
    interruption: Interruption | None


def begin(
    config: RunConfig,
    setup: TrainSetup,
    train_batches: Callable[[], grain.DatasetIterator],
    checkpoints: Checkpoints,
    found: Found | None,
    read_params: Callable[[], Any] | None = None,
) -> tuple[TrainState, grain.DatasetIterator]:
    """Restores the newest checkpoint, or creates the first state.

    Args:
      config: the run.
      setup: its set-up.
      train_batches: opens the training batches at their beginning.
      checkpoints: the run's checkpoints.
      found: the run to resume; None: a new one.
      read_params: reads initial parameters; None: they are random.

    Returns:
      The state, and the batches of the steps after it.

    Raises:
      CheckpointError: there are checkpoints, and none can be read.
    """
    state, batches = continuation.restore(
        checkpoints, setup.abstract_state, train_batches, found, report=console.warn
    )
    if found and found.has_other_evaluation:
        checkpoints.forget_losses()
    if state is not None:
        return state, batches
    if found and processes.is_first():
        console.warn("the run was stopped before its first checkpoint and starts over")
    if read_params is None:
        return setup.create_state(jax.random.key(config.seed)), batches
    with console.user_errors(ValueError, OSError):
        params = read_params()
    return setup.create_state_of(params), batches


def evaluate_first(
    setup: TrainSetup,
    state: TrainState,
    begin_evaluation: BeginEvaluation,
    batch: Batch,
) -> dict[str, float]:
    """Evaluates the first state, and traces the step while the devices work.

    Args:
      setup: the set-up.
      state: the state before training.
      begin_evaluation: dispatches an evaluation.
      batch: any batch of the training's shapes.
    """
    finish = begin_evaluation(state.params)
    setup.train_step.lower(state, setup.place(batch))
    return finish()


def held_out_loss(row: Row) -> float | None:
    """Held-out loss of a step, None if it was not evaluated."""
    return row.get("eval_loss")


def train(
    config: RunConfig,
    setup: TrainSetup,
    state: TrainState,
    batches: grain.DatasetIterator,
    checkpoints: Checkpoints,
    counted: Counted,
    *,
    epoch: Callable[[grain.DatasetIterator], float],
    begin_evaluation: BeginEvaluation,
    first_evaluation: dict[str, float] | None = None,
    objective: Callable[[Row], float | None] = held_out_loss,
    is_over: Callable[[list[Row]], bool] = lambda rows: False,
) -> Finished:
    """Trains to the last step, or until a signal, with evaluations and checkpoints.

    Args:
      config: the run.
      setup: its set-up.
      state: from `begin`; it is donated.
      batches: from `begin`.
      checkpoints: the run's checkpoints.
      counted: what a step counts.
      epoch: passes over the data, so far.
      begin_evaluation: dispatches an evaluation.
      first_evaluation: metrics before training, recorded as step 0.
      objective: value of a step that the best checkpoint minimises, None if it was
        not evaluated.
      is_over: whether evaluations so far end the run early, given all rows.

    Raises:
      CheckpointError: a checkpoint cannot be written.
      DivergedError: too many consecutive steps were skipped.
      OSError: the metrics cannot be written.
    """
    step = first = int(state.step)
    diagnostics = Diagnostics(config, first, setup.mesh)
    journal = Journal(config, first, counted)
    with journal, diagnostics, Interruption("saving after this step") as interruption:
        if first_evaluation is not None:
            journal.begin(**first_evaluation)
        previous = None
        # A run that ended early has nothing to resume.
        last = first if is_over(journal.rows) else config.steps
        for step in range(first + 1, last + 1):
            diagnostics.before(step, state, journal.skipped_steps)
            # Only dispatched: the previous step is recorded while this one runs.
            state, values = setup.train_step(state, setup.place(next(batches)))
            values["epoch"] = epoch(batches)
            if previous is not None:
                journal.record(*previous)
            previous = (step, values)
            diagnostics.after(step, state, journal.watch)
            if step % config.eval_every_steps == 0 or step == config.steps:
                jax.block_until_ready(values)
                with journal.watch.pause():
                    values |= begin_evaluation(state.params)()
                # All processes stop at the same step.
                if processes.agree(is_over([*journal.rows, values])):
                    last = step
            is_last = interruption.reached(step) or step == last
            value = objective(values)
            is_due = step % config.checkpoint.checkpoint_every_steps == 0
            if is_due or is_last or checkpoints.is_best(value):
                # The row first: a checkpoint must have the rows of all its steps.
                journal.record(*previous)
                previous = None
                with journal.watch.pause():
                    journal.sync()
                    diagnostics.sync()
                    checkpoints.save(step, state, batches, value)
            if is_last:
                break
        checkpoints.wait()
    is_stopped = interruption.received is not None and step < last
    return Finished(state, journal.rows, interruption if is_stopped else None)
