"""Continues text with a trained model."""

import jax
import jax.numpy as jnp

from models import generation
from train import cli, compilation_cache, trained
from train.checkpoint import CheckpointError, quiet_orbax
from train.generate import GenerateConfig


def run(config: GenerateConfig) -> None:
    """Reads the model and prints what it writes."""
    compilation_cache.use(config.start)
    quiet_orbax()
    with cli.user_errors(ValueError, OSError, CheckpointError):
        texts = generate(config)
    print("\n\n".join(texts))


def generate(config: GenerateConfig) -> list[str]:
    """Continues the prompt, once for each sample.

    Raises:
      ValueError, CheckpointError, OSError: there is no model to be read.
    """
    model = trained.load(config.checkpoint, config.choice)
    prompt = jnp.array([model.tokenizer.prompt(config.prompt)] * config.num_samples)
    tokens = generation.generate(
        model.model,
        prompt,
        jax.random.key(config.seed),
        length=config.length_tokens,
        temperature=config.temperature,
    )
    return [
        model.tokenizer.continue_text(config.prompt, row) for row in tokens.tolist()
    ]
