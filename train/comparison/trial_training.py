"""One training run of a comparison, timed step by step."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.comparison.trial_records import Record, Trial, finite, step_kinds
from train.config.methods import matrix_scale_field
from train.config.optimizer_config import OptimizerConfig
from train.config.pretrain_config import TextTask
from train.data.dataset import Text
from train.step import optimizers
from train.step.language_model import abstract_batch
from train.step.setup import llama_setup
from train.system.provenance import machine, versions

# A trial has diverged after so many steps in a row that changed nothing.
MAX_SKIPPED_STEPS_IN_A_ROW = 10
# Points of the training curve, which is averaged in between.
MAX_CURVE_POINTS = 200


class Runner:
    """Runs trials on the first device.

    Learning rate, factor on matrices and seed are numbers in the optimizer's state, so
    that all trials of a method share a compiled program.
    """

    def __init__(self, task: TextTask, text: Text, command: str):
        self._task, self._text, self._command = task, text, command
        self._program = functools.cache(self._compile)

    def run(self, trial: Trial, after_step: Callable[[float], bool]) -> Record | None:
        """Trains and evaluates, with each step timed from its dispatch to its end.

        Returns None once `after_step`, called with each step's loss, returns False.
        """
        optimizer, steps = trial.optimizer, self._task.steps
        ones = {"learning_rate": 1.0, matrix_scale_field(optimizer.name): 1.0}
        program = self._program(dataclasses.replace(optimizer, **ones))
        setup, train_step, compile_seconds = program
        state = setup.create_state(jax.random.key(trial.seed))
        numbers = {
            "learning_rate": jnp.float32(optimizer.learning_rate),
            "matrix_scale": jnp.float32(trial.matrix_scale),
            "seed": jnp.uint32(trial.seed),
        }
        state = state._replace(opt_state=state.opt_state._replace(hyperparams=numbers))
        kinds = iter(step_kinds(optimizer, steps))
        seconds, rows, evaluations = collections.defaultdict(list), [], []
        skipped, diverged = [0], False
        with contextlib.closing(self._text.train_batches(trial.seed)) as batches:
            while len(rows) < steps and not diverged:
                batch = jax.block_until_ready(setup.place(next(batches)))
                began = time.perf_counter()
                state, values = jax.block_until_ready(train_step(state, batch))
                seconds[next(kinds)].append(time.perf_counter() - began)
                row = {name: float(values[name]) for name in values}
                del row["count"], row["learning_rate"]
                skipped.append(row.pop("skipped_steps"))
                rows.append(row)
                recent = skipped[-MAX_SKIPPED_STEPS_IN_A_ROW - 1 :]
                diverged = recent[-1] - recent[0] == MAX_SKIPPED_STEPS_IN_A_ROW
                step = len(rows)
                if step % self._task.eval_every_steps == 0 or step == steps or diverged:
                    held_out = self._text.held_out_batches()
                    loss = setup.begin_evaluation(state.params, held_out)()
                    evaluations.append((step, finite(loss)))
                    diverged = diverged or not math.isfinite(loss)
                if not after_step(rows[-1]["loss"]):
                    return None
        own_state = state.opt_state.inner_state  # without the numbers beside it
        return Record(
            trial=trial,
            diverged=diverged,
            skipped_steps=int(skipped[-1]),
            evaluations=evaluations,
            curve=thinned(rows, steps),
            step_seconds={kind: float(np.median(x)) for kind, x in seconds.items()},
            measured_seconds=sum(map(sum, seconds.values())),
            compile_seconds=compile_seconds,
            state_bytes=sum(x.nbytes for x in jax.tree.leaves(own_state)),
            parameters=sum(x.size for x in jax.tree.leaves(state.params)),
            versions=versions(),
            machine=machine(),
            command=self._command,
        )

    def _compile(self, config: OptimizerConfig):
        """The set-up, its compiled step and the seconds that took."""
        task = self._task
        schedule = optimizers.learning_rate_schedule(config, task.steps)

        def with_numbers(learning_rate, matrix_scale, seed):
            rate = lambda step: learning_rate * schedule(step)
            return optimizers.make_optimizer(
                config, rate, seed, matrix_scale, task.steps
            )

        inject = optax.inject_hyperparams(with_numbers, hyperparam_dtype=jnp.float32)
        setup = llama_setup(
            task.model,
            inject(1.0, 1.0, jnp.uint32(0)),
            schedule,
            task.z_loss_weight,
            gradient_accumulation_steps=task.gradient_accumulation_steps,
            max_gradient_norm=config.max_gradient_norm,
        )
        began = time.perf_counter()
        batch = abstract_batch(task.data)
        compiled = setup.train_step.lower(setup.abstract_state, batch).compile()
        return setup, compiled, time.perf_counter() - began


def thinned(
    rows: Sequence[dict[str, float]], total: int
) -> list[tuple[int, dict[str, float | None]]]:
    """Averages metrics over chunks of steps: at most MAX_CURVE_POINTS per run."""
    size = math.ceil(total / MAX_CURVE_POINTS)
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    means = (jax.tree.map(lambda *x: finite(float(np.mean(x))), *x) for x in chunks)
    return list(zip(itertools.accumulate(map(len, chunks)), means, strict=True))
