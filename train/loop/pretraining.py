"""Pre-training of a LLaMA, from opening the text to the last sample."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from models import generation, llama
from train.config.pretrain_config import PRETRAIN, PretrainConfig
from train.data import dataset as data
from train.generation import writing
from train.loop import continuation, messages, opening, training_loop
from train.loop.subspace_report import check_has_subspaces
from train.rundir.changes import evaluation_start
from train.rundir.checkpoints import Checkpoints
from train.rundir.directory import Found
from train.step import given_weights, optimizers, throughput
from train.step.mesh import check_batch, make_mesh
from train.step.setup import pretraining
from train.system import console, out_of_memory, processes


def pretrain(
    config: PretrainConfig,
    found: Found | None,
    text: data.Text,
    checkpoints: Checkpoints,
    mesh: Mesh,
    read_weights: Callable[[], Any] | None,
) -> int:
    """Trains from the newest checkpoint, or from the start, to the last step.

    Args:
      config: the run.
      found: the run to resume; None for a new run.
      text: the text.
      checkpoints: checkpoints to restore and save.
      mesh: the devices, set as JAX's mesh.
      read_weights: reads the parameters of --init-from; None: random parameters.

    Returns:
      The exit code: 0, or that of the signal that stopped the run.

    Raises:
      CheckpointError: a checkpoint cannot be written, or none can be read.
      DivergedError: the loss stays infinite.
      MemoryError: the model is too large for the devices.
      OSError: the metrics cannot be written.
    """
    setup = pretraining(config, mesh)
    out_of_memory.check(setup.abstract_state)

    def begin_evaluation(params: Any) -> Callable[[], dict[str, float]]:
        finish = setup.begin_evaluation(params, text.held_out_batches())
        return lambda: {"eval_loss": finish()}

    def sample(params: Any) -> str:
        return _sample(nnx.merge(llama.definition(config.model), params), text, config)

    state, batches = training_loop.begin(
        config, setup, text.train_batches, checkpoints, found, read_weights
    )
    first = int(state.step)
    opening.save_settings(config, found, state)
    print(messages.summary(config, text, state))
    evaluation = None
    if first == 0:
        example = next(text.held_out_batches())
        evaluation = training_loop.evaluate_first(
            setup, state, begin_evaluation, example
        )
        eval_loss = evaluation["eval_loss"]
        shown = sample(state.params)
        print(f"\nBefore training, held-out loss {eval_loss:.3f}:\n{shown}\n")
        # Random weights need no best checkpoint.
        if config.init_from is not None and checkpoints.is_best(eval_loss):
            checkpoints.save(0, state, batches, eval_loss)
    else:
        print(f"\nContinued after step {first:,}.\n")
    if found and found.changes:
        print(continuation.describe(config, found, state), end="\n\n")
    finished = training_loop.train(
        config,
        setup,
        state,
        batches,
        checkpoints,
        throughput.tokens(config.model, config.data),
        epoch=text.epoch,
        begin_evaluation=begin_evaluation,
        first_evaluation=evaluation,
    )
    if finished.interruption is not None:
        print(messages.stopped(finished, PRETRAIN, config.output_dir))
        return finished.interruption.exit_code
    since = evaluation_start(config.output_dir)
    comparable = [row for row in finished.rows if row["step"] > since]
    outcome = messages.outcome(comparable, checkpoints.steps)
    print(f"\n{outcome}\n{sample(finished.state.params)}\n")
    if advice := messages.advice(config, comparable):
        opening.warn_once(advice)
    print(messages.farewell(config))
    return 0


def _sample(model: Any, text: data.Text, config: PretrainConfig) -> str:
    prompt = config.sample.sample_prompt
    pieces = writing.write(
        model,
        text.tokenizer,
        prompt,
        jax.random.key(config.seed)[None],
        length=config.sample.sample_length_tokens,
        sampling=generation.Sampling(config.sample.sample_temperature),
        positions=config.positions,
    )
    return prompt + "".join(piece for _, piece in pieces)


def _open_text(config: PretrainConfig, found: Found | None) -> data.Text:
    """Opens the text and the run's tokenizer, which the first process may train."""

    def open_text(tokenizer_directory: pathlib.Path | None) -> data.Text:
        return data.open_text(
            config.data,
            config.model.vocabulary_size,
            seed=config.seed,
            tokenizer_directory=tokenizer_directory,
            weights=config.init_from,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            report=console.warn,
        )

    with processes.together(ValueError):
        if processes.is_first():
            text = open_text(config.output_dir if found else None)
            writing.prompt_ids(
                text.tokenizer,
                config.sample.sample_prompt,
                config.positions,
                "--sample-prompt",
            )
            if not found:
                opening.save_new(config, text.tokenizer)
    with processes.together(ValueError):
        if not processes.is_first():
            text = open_text(config.output_dir)
    return text


def run(config: PretrainConfig) -> int:
    """Opens directory, text and devices of a run, trains, returns the exit code.

    Errors that a user can cause end the program with one line.
    """
    with contextlib.ExitStack() as stack:
        with console.user_errors(ValueError, OSError):
            opening.start(stack, config)
            with processes.together(ValueError):
                config = given_weights.settle(config, opening.warn_once)
                check_has_subspaces(config)
                optimizers.check_rank(config.optimizer, config.model)
                mesh = make_mesh(config.mesh)
                check_batch(
                    config.data.batch_size_sequences,
                    config.gradient_accumulation_steps,
                    mesh,
                )
            found = opening.open_shared(stack, config)
            with processes.together(ValueError):
                read_weights = given_weights.reader(config, now=not found)
            text = _open_text(config, found)
        with opening.training(config, mesh) as checkpoints:
            return pretrain(config, found, text, checkpoints, mesh, read_weights)
