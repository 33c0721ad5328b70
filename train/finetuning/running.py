"""Fine-tuning run, from opening the data to the test with the best model."""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.config.finetune_config import FINETUNE, FinetuneConfig
from train.config.run_config import CheckpointChoice
from train.finetuning import batches, evaluation, results
from train.finetuning.evaluation import Evaluator, Scores
from train.finetuning.messages import farewell, summary
from train.finetuning.preparation import Prepared, prepare, read_weights
from train.loop import continuation, messages, opening, training_loop
from train.loop.subspace_report import check_has_subspaces
from train.rundir.checkpoint_reading import restore_params
from train.rundir.checkpoints import Checkpoints
from train.rundir.directory import Found
from train.step import given_weights, optimizers
from train.step.mesh import check_rows, make_mesh
from train.step.setup import finetuning
from train.step.throughput import Counted
from train.step.train_state import TrainState
from train.system import console, out_of_memory, processes

_TIMED_UPDATES = 5


class _Run:
    """A run with its rows in batches: evaluates, trains, tests.

    Args:
      prepared: the run's config, data and tokenizer.
      mesh: the devices, set as JAX's mesh.
    """

    def __init__(self, prepared: Prepared, mesh: Mesh):
        self.config, self.data = prepared.config, prepared.data
        data = self.config.data
        self._buckets = batches.bucket_lengths(
            data.max_length_tokens, data.length_buckets
        )
        self.setup = finetuning(self.config, mesh)
        self.metric = results.metric_of(self.data)
        self.padding = batches.Padding(
            self.data.train,
            self._buckets,
            self.config.model.padding_id,
            data.batch_size_examples,
            processes.own_part(data.batch_size_examples),
        )
        self._evaluator = Evaluator(
            self.config.model,
            self._buckets,
            data.eval_batch_size_examples,
            mesh,
            processes.own_part(data.eval_batch_size_examples),
        )
        self._has_told_constant = False

    def train_batches(self) -> Any:
        """Opens the training batches at their beginning."""
        return batches.shuffled_batches(self.padding, self.config.seed)

    def epoch(self, iterator: Any) -> float:
        """Passes over the training rows so far."""
        size = self.config.data.batch_size_examples
        per_epoch = -(-len(self.data.train) // size)
        return batches.epochs(iterator.get_state(), per_epoch)

    def begin_evaluation(self, params: Any) -> Callable[[], dict[str, float]]:
        """Dispatches an evaluation of all validation splits."""
        begun = [
            (split, self._evaluator.begin(params, split))
            for split in self.data.validation
        ]

        def finish() -> dict[str, float]:
            found = {}
            for split, logits in begun:
                scores = self._score(split, logits())
                if split is self.data.validation[0]:
                    found["eval_loss"] = scores.loss
                found |= evaluation.named(split, scores.outcome.values)
            return found

        return finish

    def _score(self, split: Any, logits: np.ndarray) -> Scores:
        task, classes = self.data.task, self.data.classes
        scores = evaluation.score(task, classes, split, logits)
        if scores.outcome.is_constant and not self._has_told_constant:
            self._has_told_constant = True
            name = task.metrics[0].replace("_", " ")
            opening.warn_once(
                f"all predictions for {split.name} are the same: its {name} is "
                f"{scores.outcome.values[task.metrics[0]]:.3f}"
            )
        return scores

    def objective(self, row: dict[str, Any]) -> float | None:
        """What the best checkpoint minimises."""
        return -row[self.metric] if self.metric in row else None

    def is_over(self, rows: list[dict[str, Any]]) -> bool:
        """Whether evaluations no longer improve."""
        return results.is_over(rows, self.metric, self.config.patience_evals)

    def test(self, params: Any) -> dict[str, Scores]:
        """Evaluates the test splits."""
        return {
            split.name: self._score(split, self._evaluator.begin(params, split)())
            for split in self.data.test
        }


def finetune(
    run: _Run,
    found: Found | None,
    checkpoints: Checkpoints,
    read_params: Callable[[], Any],
) -> int:
    """Trains to the last step, and tests the best model.

    Args:
      run: the run.
      found: its earlier part, to resume; None for a new run.
      checkpoints: checkpoints to restore and save.
      read_params: reads the parameters to start from.

    Returns:
      The exit code: 0, or that of the signal that stopped the run.

    Raises:
      CheckpointError: a checkpoint cannot be written, or none can be read.
      DivergedError: the loss stays infinite.
      MemoryError: the model is too large for the devices.
      OSError: the metrics cannot be written.
    """
    config, setup = run.config, run.setup
    out_of_memory.check(setup.abstract_state)
    state, iterator = training_loop.begin(
        config, setup, run.train_batches, checkpoints, found, read_params
    )
    first = int(state.step)
    opening.save_settings(config, found, state)
    print(summary(config, run.data, state))
    evaluated = None
    if first == 0:
        example = run.padding(np.arange(min(run.padding.size, len(run.data.train))))
        evaluated = training_loop.evaluate_first(
            setup, state, run.begin_evaluation, example
        )
        value = evaluated[run.metric]
        print(f"\nBefore training, held-out {run.metric[5:]} {value:.3f}\n")
    else:
        print(f"\nContinued after step {first:,}.\n")
    if found and found.changes:
        print(continuation.describe(config, found, state), end="\n\n")
    finished = training_loop.train(
        config,
        setup,
        state,
        iterator,
        checkpoints,
        Counted("examples", config.data.batch_size_examples),
        epoch=run.epoch,
        begin_evaluation=run.begin_evaluation,
        first_evaluation=evaluated,
        objective=run.objective,
        is_over=run.is_over,
    )
    last = int(finished.state.step)
    if finished.interruption is not None:
        print(messages.stopped(finished, FINETUNE, config.output_dir))
        return finished.interruption.exit_code
    if last < config.steps:
        print(
            f"\nEnded after step {last:,}: {config.patience_evals} evaluations without "
            f"a better {run.metric[5:]}"
        )
    print("\n" + _report(run, finished.state, finished.rows, checkpoints.steps, first))
    print(farewell(config))
    return 0


def _report(
    run: _Run,
    state: TrainState,
    rows: list[dict[str, Any]],
    saved: list[int],
    first: int,
) -> str:
    """Tests the best model, once, and writes results.json."""
    config, last = run.config, int(state.step)
    known = results.load(config.output_dir)
    if first == last and known is not None and known["steps"] == last:
        return results.describe(known)
    best = results.best_row(rows, run.metric)["step"]
    params, step = state.params, last
    if best != last and best in saved and run.data.test:
        abstract = run.setup.abstract_state.params
        choice = CheckpointChoice(step=best)
        restored = restore_params(config.output_dir, abstract, choice, console.warn)
        params, step = restored.params, best
    test = run.test(params)
    found = results.make(config, run.data, state, rows, test, step)
    found["update_seconds"] = _update_seconds(run, state)
    if processes.is_first():
        results.save(config.output_dir, found)
    return results.describe(found)


def _update_seconds(run: _Run, state: TrainState) -> float:
    """Median seconds of an optimizer update between two changes of the subspaces.

    The state is donated.
    """
    lengths, size = run.padding.split.lengths, run.padding.size
    rows = batches.ShuffledRows(lengths, size, run.config.seed)[0]
    step = run.setup.train_step
    batch = run.setup.place(run.padding(rows))
    values = step.compute(state.params, state.step, batch)
    seconds = []
    for _ in range(_TIMED_UPDATES):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step.apply(state, *values))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _check_batches(config: FinetuneConfig, mesh: Mesh) -> None:
    parts = config.gradient_accumulation_steps
    check_rows("--batch-size-examples", config.data.batch_size_examples, parts, mesh)
    check_rows(
        "--eval-batch-size-examples", config.data.eval_batch_size_examples, 1, mesh
    )


def _check_optimizer(config: FinetuneConfig) -> None:
    check_has_subspaces(config)
    name = config.optimizer.name
    if config.freeze == "matrices" and name != "adamw":
        raise ValueError(
            f"--freeze matrices leaves nothing to --optimizer {name}, which is for "
            "matrices: give --optimizer adamw, which updates the rest"
        )
    optimizers.check_rank(config.optimizer, config.model)


def run(config: FinetuneConfig) -> int:
    """Opens data, model, directory and devices of a run, trains, returns the exit code.

    Errors that a user can cause end the program with one line.
    """
    with contextlib.ExitStack() as stack:
        with console.user_errors(ValueError, OSError):
            opening.start(stack, config)
            with processes.together(ValueError):
                mesh = make_mesh(config.mesh)
                _check_batches(config, mesh)
                prepared = prepare(config, opening.warn_once)
                config = prepared.config
                _check_optimizer(config)
            found = opening.open_shared(stack, config)
            with processes.together(ValueError):
                read_params = given_weights.held(
                    lambda: read_weights(prepared, opening.warn_once), now=not found
                )
                if processes.is_first() and not found:
                    opening.save_new(config, prepared.tokenizer)
        with opening.training(config, mesh) as checkpoints:
            return finetune(_Run(prepared, mesh), found, checkpoints, read_params)
