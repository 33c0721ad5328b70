"""Writes text with a model of a run: `python -m train.generate --help`."""

import dataclasses
import io
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from models import generation
from train import cli, trained
from train.checkpoint import CheckpointError, quiet_orbax
from train.config import BEST_OR_NEWEST, CheckpointChoice
from train.rules import at_least_1, check, fits_32_bits, positive

PROGRAM = "python -m train.generate"


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Writes text with a model of a pre-training run.

    Attributes:
      checkpoint: directory of the run, its --output-dir.
      prompt: text to continue.
      length_tokens: tokens to add to the prompt.
      temperature: divides the logits: below 1 safer, above 1 wilder.
      num_samples: texts to write, each another.
      seed: decides the texts.
      choice: which checkpoint.
    """

    checkpoint: pathlib.Path
    prompt: str = "The whale"
    length_tokens: int = 200
    temperature: float = 0.7
    num_samples: int = 1
    seed: int = 0
    choice: CheckpointChoice = BEST_OR_NEWEST

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        check(self, at_least_1, "length_tokens", "num_samples")
        check(self, positive, "temperature")
        check(self, fits_32_bits, "seed")


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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    config = cli.read(GenerateConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    quiet_orbax()
    with cli.user_errors(ValueError, OSError, CheckpointError):
        texts = generate(config)
    print("\n\n".join(texts))


if __name__ == "__main__":
    main()
