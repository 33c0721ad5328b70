"""Training loop: set-up, steps, evaluations, checkpoints, samples."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from models import generation, llama
from train.config.pretrain_config import PretrainConfig
from train.data import dataset as data
from train.generation import writing
from train.loop import continuation, hosts, messages
from train.loop.subspace_report import Diagnostics, check_has_subspaces
from train.rundir import disk_space, metrics
from train.rundir.changes import evaluation_start
from train.rundir.checkpoints import CheckpointError, Checkpoints, quiet_orbax
from train.rundir.directory import Found, keep_settings, open_directory
from train.rundir.journal import DivergedError, Journal
from train.rundir.saved_config import CONFIG_FILE, save_config
from train.step import given_weights, optimizers, placement
from train.step.mesh import check_batch, make_mesh
from train.step.setup import TrainSetup, pretraining
from train.step.train_state import TrainState
from train.system import compilation_cache, console, out_of_memory, processes
from train.system.interruption import Interruption


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

    def begin_evaluation() -> Callable[[], float]:
        return setup.begin_evaluation(state.params, text.held_out_batches())

    def sample() -> str:
        model = nnx.merge(llama.definition(config.model), state.params)
        return _sample(model, text, config)

    state, batches = continuation.restore(
        checkpoints, setup.abstract_state, text, found, report=console.warn
    )
    if state is None:
        if found:
            _warn_once(
                "the run was stopped before its first checkpoint and starts over"
            )
        state = _create_state(config, setup, read_weights)
    first = int(state.step)
    is_other = bool(found and found.has_other_evaluation)
    if is_other:
        checkpoints.forget_losses()
    with processes.together(OSError):
        if processes.is_first():
            changes = found.changes if found else {}
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            disk_space.check(config, first, size, console.warn)
            keep_settings(config, changes, first, evaluates_other_text=is_other)
    print(messages.summary(config, text, state))
    eval_loss = None
    if first == 0:
        finish_evaluation = begin_evaluation()
        # Compile the first step while the devices evaluate.
        setup.train_step.lower(state, setup.place(next(text.held_out_batches())))
        eval_loss = finish_evaluation()
        print(f"\nBefore training, held-out loss {eval_loss:.3f}:\n{sample()}\n")
        # Random weights need no best checkpoint.
        if config.init_from is not None and checkpoints.is_best(eval_loss):
            checkpoints.save(0, state, batches, eval_loss)
    else:
        print(f"\nContinued after step {first:,}.\n")
    if found and found.changes:
        print(continuation.describe(config, found, state), end="\n\n")

    diagnostics = Diagnostics(config, first, mesh)
    journal = Journal(config, first)
    with journal, diagnostics, Interruption("saving after this step") as interruption:
        if eval_loss is not None:
            journal.begin(eval_loss)
        previous = None
        for step in range(first + 1, config.steps + 1):
            diagnostics.before(step, state, journal.skipped_steps)
            # Dispatched only: while it runs, the previous step is recorded.
            state, values = setup.train_step(state, setup.place(next(batches)))
            values["epoch"] = text.epoch(batches)
            if previous is not None:
                journal.record(*previous)
            previous = (step, values)
            diagnostics.after(step, state, journal.watch)
            if step % config.eval_every_steps == 0 or step == config.steps:
                jax.block_until_ready(values)
                with journal.watch.pause():
                    values["eval_loss"] = begin_evaluation()()
            is_last = interruption.reached(step) or step == config.steps
            eval_loss = values.get("eval_loss")
            is_due = step % config.checkpoint.checkpoint_every_steps == 0
            if is_due or is_last or checkpoints.is_best(eval_loss):
                # The row first: a checkpoint must have the rows of all its steps.
                journal.record(*previous)
                previous = None
                with journal.watch.pause():
                    journal.sync()
                    diagnostics.sync()
                    checkpoints.save(step, state, batches, eval_loss)
            if is_last:
                break
        checkpoints.wait()
    if interruption.received is not None and step < config.steps:
        print(
            f"\nStopped by {interruption.received.name} after step {step:,}, which is "
            f"saved. To continue: {messages.resume(config)}"
        )
        return interruption.exit_code
    since = evaluation_start(config.output_dir)
    comparable = [row for row in journal.rows if row["step"] > since]
    print(f"\n{messages.outcome(comparable, checkpoints.steps)}\n{sample()}\n")
    if advice := messages.advice(config, comparable):
        _warn_once(advice)
    print(messages.farewell(config))
    return 0


def _create_state(
    config: PretrainConfig,
    setup: TrainSetup,
    read_weights: Callable[[], Any] | None,
) -> TrainState:
    if read_weights is None:
        return setup.create_state(jax.random.key(config.seed))
    with console.user_errors(ValueError, OSError):
        params = read_weights()
    return setup.create_state_of(params)


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


def _warn_once(message: str) -> None:
    if processes.is_first():
        console.warn(message)


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
                # The config first: it marks the other files as this program's own.
                save_config(config, config.output_dir / CONFIG_FILE)
                text.tokenizer.save(config.output_dir)
    with processes.together(ValueError):
        if not processes.is_first():
            text = open_text(config.output_dir)
    return text


def run(config: PretrainConfig) -> int:
    """Opens directory, text and devices of a run, trains, returns the exit code.

    Errors that a user can cause end the program with one line.
    """
    compilation_cache.use(config.start)
    out_of_memory.trim_after_compilations()
    quiet_orbax()
    with contextlib.ExitStack() as stack:
        with console.user_errors(ValueError, OSError):
            stack.enter_context(processes.silence_all_but_first())
            hosts.check_same_program(config)
            with processes.together(ValueError):
                metrics.check_packages(config)
                config = given_weights.settle(config, _warn_once)
                check_has_subspaces(config)
                optimizers.check_rank(config.optimizer, config.model)
                mesh = make_mesh(config.mesh)
                check_batch(
                    config.data.batch_size_sequences,
                    config.gradient_accumulation_steps,
                    mesh,
                )
            opened = None
            with processes.together(ValueError):
                if processes.is_first():
                    opened = stack.enter_context(open_directory(config))
            shared = processes.share(opened)
            found = None if shared is None else Found(*shared)
            hosts.check_shared(config.output_dir)
            hosts.check_same_text(config)
            with processes.together(ValueError):
                read_weights = given_weights.reader(config, now=not found)
            text = _open_text(config, found)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(placement.rules())
        # From here on a ValueError is a bug and shows a traceback.
        with (
            console.user_errors(OSError, CheckpointError, DivergedError, MemoryError),
            out_of_memory.one_line_errors(),
            Checkpoints(config.output_dir, config.checkpoint) as checkpoints,
        ):
            return pretrain(config, found, text, checkpoints, mesh, read_weights)
