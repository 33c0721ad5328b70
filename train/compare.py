"""Compares optimizers on one task: `python -m train.compare --help`."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.comparison.comparison_config import CompareConfig, Settings
from train.config.presets import PRESETS
from train.config.pretrain_config import TextTask

PROGRAM = "python -m train.compare"
COMMON = (
    *("--preset", "--output-dir", "--optimizers", "--learning-rates"),
    *("--matrix-scales", "--seeds", "--tuning-seeds", "--sweep"),
    *("--data-glob", "--dataset", "--tokenizer", "--steps", "--batch-size-sequences"),
    *("--sequence-length-tokens", "--rank", "--update-interval"),
)
EXAMPLES = (
    Example(
        "two optimizers at three learning rates, one seed",
        "--optimizers adamw subtrack --learning-rates 1e-3 3e-3 1e-2 --seeds 0",
    ),
    Example(
        "the effect of the rank, on your own text",
        "--data-glob 'texts/**/*.txt' --optimizers subtrack --sweep rank=16,32,64",
    ),
)


def read(argv: Sequence[str]) -> CompareConfig:
    """Parses the command line, with defaults from a preset of train.pretrain."""
    run = command_line.run_of_preset(argv, PRESETS)
    shared = [field.name for field in dataclasses.fields(TextTask)]
    task = TextTask(**{name: getattr(run, name) for name in shared})
    settings = Settings(**dataclasses.asdict(run.optimizer))
    default = CompareConfig(task, run.preset, settings=settings)
    return command_line.read(CompareConfig, PROGRAM, argv, default, COMMON, EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join([*PROGRAM.split(), *argv])
    config = read(argv)
    from train.comparison import comparing

    sys.exit(comparing.run(config, command))


if __name__ == "__main__":
    main()
