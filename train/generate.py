"""Generates text with a trained model: `python -m train.generate --help`."""

import io
import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.generation.generation_config import GenerateConfig

PROGRAM = "python -m train.generate"
EXAMPLES = (
    Example("the model of the default run", "--checkpoint runs/pretrain"),
    Example(
        "three varied continuations of a prompt",
        "--checkpoint runs/pretrain --prompt 'Call me' --num-samples 3 "
        "--temperature 1.0 --top-p 0.95",
    ),
    Example(
        "a conversation with a model of train.sft",
        "--chat --checkpoint runs/sft",
    ),
    Example(
        "the likeliest text, with a model in Hugging Face's layout",
        "--checkpoint path/to/llama --prompt-file prompt.txt --temperature 0",
    ),
)


def read(argv: Sequence[str]) -> GenerateConfig:
    """Parses the command line."""
    return command_line.read(GenerateConfig, PROGRAM, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    config = read(sys.argv[1:] if argv is None else argv)
    from train.generation import sampling

    sampling.run(config)


if __name__ == "__main__":
    main()
