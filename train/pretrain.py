"""Pre-trains a LLaMA on text: `python -m train.pretrain --help`."""

import contextlib
import dataclasses
import io
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import generation, hugging_face
from train import cli, data, metrics, optimizers
from train import step as steps
from train.checkpoint import CheckpointError, Checkpoints, quiet_orbax
from train.config import PretrainConfig
from train.interruption import Interruption
from train.journal import DivergedError, Journal
from train.presets import PRESETS
from train.run import CONFIG_FILE, open_directory, save_config

PROGRAM = "python -m train.pretrain"


def pretrain(config: PretrainConfig, text: data.Text, checkpoints: Checkpoints) -> int:
    """Trains from the newest checkpoint, or from the start, to the last step.

    Returns:
      The exit code: 0, or that of a signal which stopped the run.

    Raises:
      CheckpointError: a checkpoint cannot be written, or none can be read.
      DivergedError: the loss stays infinite.
      OSError: the metrics cannot be written.
    """
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, config.seed)
    definition = steps.model_definition(config.model)
    train_step = steps.make_train_step(
        definition,
        optimizer,
        schedule,
        config.gradient_accumulation_steps,
        config.z_loss_weight,
    )

    def create() -> steps.TrainState:
        return steps.create_state(config.model, optimizer, jax.random.key(config.seed))

    def evaluate() -> float:
        return steps.evaluate(definition, state.params, text.held_out_batches())

    def sample() -> str:
        return _sample(nnx.merge(definition, state.params), text, config)

    batches = text.train_batches()
    state = checkpoints.restore(jax.eval_shape(create), batches, report=_warn)
    if state is None and config.init_from is not None:
        with cli.user_errors(ValueError, OSError):
            _, params = hugging_face.load(
                config.init_from, param_dtype=config.model.param_dtype
            )
        state = steps.create_state_of(params, optimizer)
    elif state is None:
        state = create()
    first = int(state.step)
    print(_summary(config, text, state))
    if first == 0:
        print(f"\nBefore training, held-out loss {evaluate():.3f}:\n{sample()}\n")
    else:
        print(f"\nContinued after step {first:,}.\n")

    journal = Journal(config, first)
    with journal, Interruption() as interruption:
        previous = None
        for step in range(first + 1, config.steps + 1):
            # Only dispatched: while it runs, the step before is written down.
            state, values = train_step(state, next(batches))
            if previous is not None:
                journal.record(*previous)
            previous = (step, values)
            is_last = step == config.steps or interruption.received is not None
            if step % config.eval_every_steps == 0 or step == config.steps:
                jax.block_until_ready(values)
                with journal.watch.pause():
                    values["eval_loss"] = evaluate()
            if step % config.checkpoint.checkpoint_every_steps == 0 or is_last:
                # The row first: a checkpoint has the rows of all its steps.
                journal.record(*previous)
                previous = None
                with journal.watch.pause():
                    checkpoints.save(step, state, batches)
            if is_last:
                break
        checkpoints.wait()
    if interruption.received is not None and step < config.steps:
        print(
            f"\nStopped by {interruption.received.name} after step {step:,}, which is "
            f"saved. To continue: {_resume(config)}"
        )
        return interruption.exit_code
    best = min((r["eval_loss"] for r in journal.rows if "eval_loss" in r), default=0)
    print(
        f"\nAfter training, best held-out loss {best:.3f}, perplexity "
        f"{math.exp(best):.2f}:\n{sample()}\n"
    )
    print(_farewell(config))
    return 0


def _sample(model: Any, text: data.Text, config: PretrainConfig) -> str:
    prompt = config.sample.sample_prompt
    tokens = generation.generate(
        model,
        jnp.array([text.tokenizer.encode(prompt)]),
        jax.random.key(config.seed),
        length=config.sample.sample_length_tokens,
        temperature=config.sample.sample_temperature,
    )
    return prompt + text.tokenizer.decode(tokens[0].tolist())


def _summary(config: PretrainConfig, text: data.Text, state: steps.TrainState) -> str:
    def size(tree: Any) -> str:
        return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:.1f} MB"

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"Model      {config.preset}: {count / 1e6:.1f} M parameters, "
        f"{size(state.params)}\n"
        f"Optimizer  {config.optimizer.name}: state of {size(state.opt_state)}\n"
        f"Text       {text.description}\n"
        f"Steps      {config.steps:,} of {config.data.batch_size_tokens:,} tokens\n"
        f"Output     {config.output_dir}"
    )


def _resume(config: PretrainConfig) -> str:
    return f"{PROGRAM} --resume --output-dir {config.output_dir}"


def _farewell(config: PretrainConfig) -> str:
    directory = config.output_dir
    saved = directory / CONFIG_FILE
    return (
        f"Metrics, curve, tokenizer, config and checkpoints are in {directory}\n"
        f"Repeat     {PROGRAM} --config {saved} --output-dir ANOTHER\n"
        f"Sample     python -m train.generate --checkpoint {directory}\n"
        f"Export     python -m train.export --checkpoint {directory} --to hf"
    )


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Runs the program with the arguments of the command line."""
    # A sample may hold any character, also where the terminal knows only some.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    config = cli.parse(PRESETS, "tiny", PROGRAM, sys.argv[1:])
    quiet_orbax()
    try:
        sys.exit(_run(config))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _with_shape_of_weights(config: PretrainConfig) -> PretrainConfig:
    """Of a run that starts from given weights, the shape and tokenizer are theirs."""
    if config.init_from is None:
        return config
    given = config.model
    theirs = hugging_face.load_config(
        config.init_from, dtype=given.dtype, param_dtype=given.param_dtype
    )
    tokenizer = config.data.tokenizer or str(config.init_from)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(theirs, remat=given.remat),
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
    )


def _run(config: PretrainConfig) -> int:
    with contextlib.ExitStack() as stack:
        with cli.user_errors(ValueError, OSError):
            metrics.check_packages(config)
            config = _with_shape_of_weights(config)
            found = stack.enter_context(open_directory(config))
            text = data.open_text(
                config.data,
                config.model.vocabulary_size,
                seed=config.seed,
                tokenizer_directory=config.output_dir if found else None,
            )
            text.tokenizer.save(config.output_dir)
            save_config(config, config.output_dir / CONFIG_FILE)
        # From here on a ValueError is a fault of the program, not of its user.
        with (
            cli.user_errors(OSError, CheckpointError, DivergedError),
            Checkpoints(config.output_dir, config.checkpoint) as checkpoints,
        ):
            return pretrain(config, text, checkpoints)


if __name__ == "__main__":
    main()
