"""Predicts rows with a fine-tuned model: `python -m train.predict --help`."""

import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.config.predict_config import PREDICT, PredictConfig

EXAMPLES = (
    Example(
        "labels for rows of one's own",
        "--checkpoint runs/finetune --file rows.jsonl --output-dir predictions",
    ),
    Example(
        "GLUE's files for the hidden test rows of a task",
        "--checkpoint runs/mnli --split test --output-dir submission",
    ),
    Example(
        "the diagnostic rows of SuperGLUE, with a model of rte",
        "--checkpoint runs/rte --task axb --output-dir submission",
    ),
)


def read(argv: Sequence[str]) -> PredictConfig:
    """Parses the command line."""
    return command_line.read(PredictConfig, PREDICT, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    config = read(sys.argv[1:] if argv is None else argv)
    from train.finetuning import predicting

    predicting.run(config)


if __name__ == "__main__":
    main()
