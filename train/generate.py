"""Writes text with a model of a run: `python -m train.generate --help`."""

import dataclasses
import io
import pathlib
import sys
from collections.abc import Sequence

from train import cli
from train.config import BEST_OR_NEWEST, CheckpointChoice, CompilationConfig
from train.rules import at_least_1, check, fits_32_bits, positive

PROGRAM = "python -m train.generate"
EXAMPLES = (
    cli.Example("of the default run", "--checkpoint runs/pretrain"),
    cli.Example(
        "three bold continuations of a prompt",
        "--checkpoint runs/pretrain --prompt 'Call me' --num-samples 3 "
        "--temperature 1.0",
    ),
)


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
      start: how to begin.
    """

    checkpoint: pathlib.Path
    prompt: str = "The whale"
    length_tokens: int = 200
    temperature: float = 0.7
    num_samples: int = 1
    seed: int = 0
    choice: CheckpointChoice = BEST_OR_NEWEST
    start: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        check(self, at_least_1, "length_tokens", "num_samples")
        check(self, positive, "temperature")
        check(self, fits_32_bits, "seed")


def read(argv: Sequence[str]) -> GenerateConfig:
    """The command line."""
    return cli.read(GenerateConfig, PROGRAM, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    config = read(sys.argv[1:] if argv is None else argv)
    from train import sampling  # slow to import: JAX, which help does without

    sampling.run(config)


if __name__ == "__main__":
    main()
