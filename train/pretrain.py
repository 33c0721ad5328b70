"""Pre-trains a LLaMA on text: `python -m train.pretrain --help`."""

import functools
import io
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from flax import nnx

from models import generation
from train import cli, data, metrics, optimizers
from train import step as steps
from train.config import PRESETS, PretrainConfig

PROGRAM = "python -m train.pretrain"


def pretrain(
    config: PretrainConfig, corpus: data.Corpus, directory: pathlib.Path
) -> None:
    """Trains from the start, writing metrics and the curve into the directory."""
    schedule = optimizers.learning_rate_schedule(config.optimizer, config.steps)
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, config.seed)
    definition = steps.model_definition(config.model)
    train_step = functools.partial(steps.train_step, definition, optimizer, schedule)
    state = steps.create_state(config.model, optimizer, jax.random.key(config.seed))

    def evaluate() -> float:
        held_out = data.held_out_batches(corpus, config.data)
        return steps.evaluate(definition, state.params, held_out)

    def sample() -> str:
        model = nnx.merge(definition, state.params)
        return _sample(model, corpus, config)

    print(_summary(config, corpus, state, directory))
    print(f"\nBefore training, held-out loss {evaluate():.3f}:\n{sample()}\n")

    batches = data.train_batches(corpus, config.data, config.seed)
    writer = metrics.MetricsWriter(directory)
    watch = metrics.Stopwatch()
    progress = tqdm.tqdm(total=config.steps, unit="step", dynamic_ncols=True)

    def record(step: int, values: dict[str, Any]) -> None:
        values = jax.device_get(values)  # waits until that step is done
        rate = config.data.batch_size_tokens / watch.lap()
        writer.write(step=step, tokens_per_second=rate, **values)
        progress.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_second=int(rate))
        progress.update()

    try:
        previous = None
        for step in range(1, config.steps + 1):
            # Only dispatched: while it runs, the step before is written down.
            state, values = train_step(state, next(batches))
            if previous is not None:
                record(*previous)
            previous = (step, values)
            if step % config.eval_every_steps == 0 or step == config.steps:
                jax.block_until_ready(values)
                with watch.pause():
                    values["eval_loss"] = evaluate()
                progress.write(f"step {step}: held-out loss {values['eval_loss']:.3f}")
        record(step, values)
    finally:
        progress.close()
        metrics.plot_curve(
            writer.rows,
            f"{config.preset}, {config.optimizer.name}",
            directory / metrics.CURVE_FILE,
        )
    best = min(row["eval_loss"] for row in writer.rows if "eval_loss" in row)
    print(f"\nAfter training, best held-out loss {best:.3f}:\n{sample()}\n")
    print(f"Metrics, curve, tokenizer and config are in {directory}")


def _sample(model: Any, corpus: data.Corpus, config: PretrainConfig) -> str:
    prompt = config.sample.sample_prompt
    tokens = generation.generate(
        model,
        jnp.array([corpus.tokenizer.encode(prompt).ids]),
        jax.random.key(config.seed),
        length=config.sample.sample_length_tokens,
        temperature=config.sample.sample_temperature,
    )
    return prompt + corpus.tokenizer.decode(tokens[0].tolist())


def _summary(
    config: PretrainConfig,
    corpus: data.Corpus,
    state: steps.TrainState,
    directory: pathlib.Path,
) -> str:
    def size(tree: Any) -> str:
        return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:.1f} MB"

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"Model      {config.preset}: {count / 1e6:.1f} M parameters, "
        f"{size(state.params)}\n"
        f"Optimizer  {config.optimizer.name}: state of {size(state.opt_state)}\n"
        f"Text       {len(corpus.train_tokens):,} tokens to train on, "
        f"{len(corpus.held_out_tokens):,} held out, vocabulary of "
        f"{corpus.tokenizer.get_vocab_size():,}\n"
        f"Steps      {config.steps:,} of {config.data.batch_size_tokens:,} tokens\n"
        f"Output     {directory}"
    )


def main() -> None:
    """Runs the program with the arguments of the command line."""
    # A sample may hold any character, also where the terminal knows only some.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    config = cli.parse(PRESETS, "tiny", PROGRAM, sys.argv[1:])
    with cli.user_errors():
        corpus = data.load_corpus(config.data, config.model.vocabulary_size)
        directory = metrics.create_run_directory(config.output_dir)
        config.save(directory / "config.json")
        corpus.tokenizer.save(str(directory / "tokenizer.json"))
    try:
        pretrain(config, corpus, directory)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {directory}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
