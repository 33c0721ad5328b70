"""Prints tables of fine-tuning runs: `python -m train.results --help`."""

import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.config.results_config import RESULTS, ResultsConfig

EXAMPLES = (Example("all runs of a directory", "runs/*"),)


def read(argv: Sequence[str]) -> ResultsConfig:
    """Parses the command line."""
    return command_line.read(ResultsConfig, RESULTS, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    config = read(sys.argv[1:] if argv is None else argv)
    from train.finetuning import results_table

    results_table.run(config)


if __name__ == "__main__":
    main()
