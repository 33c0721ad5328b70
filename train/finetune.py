"""Fine-tunes an encoder on labelled text: `python -m train.finetune --help`."""

from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example, Origins
from train.cli.launch import launch
from train.config.finetune_config import FINETUNE, FinetuneConfig
from train.config.finetune_presets import PRESETS, adapted

COMMON = (
    *("--preset", "--config", "--resume", "--output-dir", "--init-from"),
    *("--task", "--dataset", "--train-file", "--validation-file", "--test-file"),
    *("--text-field", "--pair-field", "--label-field"),
    *("--epochs", "--steps", "--batch-size-examples", "--max-length-tokens"),
    *("--optimizer", "--learning-rate", "--rank", "--freeze", "--mesh", "--seed"),
)
EXAMPLES = (
    Example(
        "your own rows, with MiniLM from the hub, on a laptop",
        "--preset small --train-file train.jsonl --test-file test.jsonl "
        "--text-field text --label-field label",
    ),
    Example("resume it", "--resume"),
    Example(
        "RoBERTa on a task of GLUE with the published settings",
        "--preset glue-base --task mrpc --output-dir runs/mrpc",
    ),
    Example(
        "the full-rank baseline",
        "--preset glue-base --task mrpc --optimizer adamw --output-dir runs/mrpc-adamw",
    ),
    Example(
        "a task of SuperGLUE from a local copy",
        "--preset superglue-large --task boolq --dataset path/to/super_glue "
        "--output-dir runs/boolq",
    ),
)


def read(argv: Sequence[str]) -> FinetuneConfig:
    """Parses the command line, with defaults from a preset or a saved config."""
    layout = {"common": COMMON, "examples": EXAMPLES}
    return command_line.parse(
        PRESETS, "default", FINETUNE, argv, adapt=starting_values, **layout
    )


def starting_values(base: FinetuneConfig, given: Origins) -> FinetuneConfig:
    """Values that the task, the optimizer and other flags imply."""
    base = adapted(base, given.task, given.optimizer)
    return command_line.with_given_lengths(base, given)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    launch(argv, read, _run)


def _run(config: FinetuneConfig) -> int:
    from train.finetuning import running

    return running.run(config)


if __name__ == "__main__":
    main()
