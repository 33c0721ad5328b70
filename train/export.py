"""Exports a model of a run for other programs: `python -m train.export --help`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

from train.cli import command_line
from train.cli.command_line import Example
from train.config.run_config import BEST_OR_NEWEST, CheckpointChoice, CompilationConfig

PROGRAM = "python -m train.export"
EXAMPLES = (
    Example(
        "the default run, for transformers",
        "--checkpoint runs/pretrain --output-dir runs/pretrain-hf",
    ),
)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Exports a checkpoint of a run in a format of other programs.

    Attributes:
      checkpoint: --output-dir of the run.
      to: format; hf: safetensors, config.json and tokenizer, as transformers loads.
      output_dir: directory to write to. None: a directory with the format's name in
        the run's directory.
      choice: which checkpoint.
      start: settings of the process.
    """

    checkpoint: pathlib.Path
    to: Literal["hf"] = "hf"
    output_dir: pathlib.Path | None = None
    choice: CheckpointChoice = BEST_OR_NEWEST
    start: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)


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
