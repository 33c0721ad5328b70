"""Exports a model of a run for other programs: `python -m train.export --help`."""

import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.generation.export_config import ExportConfig

PROGRAM = "python -m train.export"
EXAMPLES = (
    Example(
        "the default run, for transformers",
        "--checkpoint runs/pretrain --output-dir runs/pretrain-hf",
    ),
)


def read(argv: Sequence[str]) -> ExportConfig:
    """Parses the command line."""
    return command_line.read(ExportConfig, PROGRAM, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    config = read(sys.argv[1:] if argv is None else argv)
    from train.generation import exporting

    exporting.run(config)


if __name__ == "__main__":
    main()
