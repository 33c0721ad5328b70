"""One training run of a comparison, timed step by step."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from train.comparison import trial_records as records
from train.comparison.trial_records import Record
from train.comparison.variants import Trial
from train.config import methods
from train.config.optimizer_config import OptimizerConfig
from train.config.pretrain_config import TextTask
from train.data.dataset import Text
from train.step import optimizers
from train.step.language_model import abstract_batch
from train.step.setup import TrainSetup, llama_setup
from train.step.train_state import TrainState
from train.system.provenance import machine, versions

# A trial has diverged after so many steps in a row that changed nothing.
MAX_SKIPPED_STEPS_IN_A_ROW = 10


class Runner:
    """Runs trials on the first device.

    Trials that differ in rates and seed alone share a compiled program.
    """

    def __init__(self, task: TextTask, text: Text, command: str):
        self._task, self._text, self._command = task, text, command
        self._program = functools.cache(self._compile)

    def run(
        self, trial: Trial, after_step: Callable[[float], bool]
    ) -> records.Record | None:
        """Trains and evaluates.

        A step is timed from its dispatch to its end, with its batch on the device. The
        learning rate, the factor on matrices and the seed are numbers in the state, so
        that all trials of a method share the program.

        Args:
          trial: what to run.
          after_step: called with each step's loss; returns False to stop.

        Returns:
          The record, or None if it was stopped.
        """
        program = self._program(_shared(trial.optimizer))
        setup, train_step, compile_seconds = program
        state = _start(setup, trial)
        # Without the injected numbers, which do not belong to the optimizer's state.
        own_state = jax.tree.leaves(state.opt_state.inner_state)
        state_bytes = sum(leaf.nbytes for leaf in own_state)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        seconds, rows, evaluations = [], [], []
        in_a_row, skipped, diverged = 0, 0, False
        batches = self._text.train_batches(trial.seed)
        try:
            for step in range(1, self._task.steps + 1):
                batch = jax.block_until_ready(jax.device_put(next(batches)))
                began = time.perf_counter()
                state, values = jax.block_until_ready(train_step(state, batch))
                seconds.append(time.perf_counter() - began)
                row = {name: float(value) for name, value in values.items()}
                rows.append(row)
                in_a_row = in_a_row + 1 if row["skipped_steps"] > skipped else 0
                skipped = int(row["skipped_steps"])
                diverged = in_a_row >= MAX_SKIPPED_STEPS_IN_A_ROW
                is_last = step == self._task.steps or diverged
                if step % self._task.eval_every_steps == 0 or is_last:
                    held_out = self._text.held_out_batches()
                    loss = setup.begin_evaluation(state.params, held_out)()
                    evaluations.append((step, records.finite(loss)))
                    diverged = diverged or not math.isfinite(loss)
                if not after_step(row["loss"]):
                    return None
                if diverged:
                    break
        finally:
            batches.close()
        return Record(
            trial=trial,
            diverged=diverged,
            skipped_steps=skipped,
            evaluations=evaluations,
            curve=records.thinned(rows, self._task.steps),
            step_seconds=records.by_kind(seconds, trial.optimizer),
            measured_seconds=sum(seconds),
            compile_seconds=compile_seconds,
            state_bytes=state_bytes,
            parameters=parameters,
            versions=versions(),
            machine=machine(),
            command=self._command,
        )

    def _compile(self, config: OptimizerConfig):
        """The set-up, its compiled step and the seconds that took."""
        schedule = optimizers.learning_rate_schedule(config, self._task.steps)

        def with_numbers(learning_rate, matrix_scale, seed):
            return optimizers.make_optimizer(
                config,
                lambda step: learning_rate * schedule(step),
                seed,
                matrix_scale,
                self._task.steps,
            )

        numbers = {"learning_rate": 1.0, "matrix_scale": 1.0, "seed": jnp.uint32(0)}
        optimizer = optax.inject_hyperparams(
            with_numbers, hyperparam_dtype=jnp.float32
        )(**numbers)
        setup = llama_setup(
            self._task.model,
            optimizer,
            schedule,
            self._task.z_loss_weight,
            gradient_accumulation_steps=self._task.gradient_accumulation_steps,
            max_gradient_norm=config.max_gradient_norm,
        )
        batch = abstract_batch(self._task.data)
        began = time.perf_counter()
        compiled = setup.train_step.lower(setup.abstract_state, batch).compile()
        return setup, compiled, time.perf_counter() - began


def _start(setup: TrainSetup, trial: Trial) -> TrainState:
    state = setup.create_state(jax.random.key(trial.seed))
    numbers = {
        "learning_rate": jnp.float32(trial.optimizer.learning_rate),
        "matrix_scale": jnp.float32(trial.matrix_scale),
        "seed": jnp.uint32(trial.seed),
    }
    return state._replace(opt_state=state.opt_state._replace(hyperparams=numbers))


def _shared(optimizer: OptimizerConfig) -> OptimizerConfig:
    """The config without the rates that the compiled step takes as arguments."""
    field = methods.matrix_scale_field(optimizer.name)
    return dataclasses.replace(optimizer, learning_rate=1.0, **{field: 1.0})
