"""Pre-trains a LLaMA on text: `python -m train.pretrain --help`."""

from collections.abc import Sequence

from train.cli import command_line, options
from train.cli.command_line import Example, Origins
from train.cli.launch import launch
from train.config.presets import PRESETS
from train.config.pretrain_config import PRETRAIN, PretrainConfig

COMMON = (
    *("--preset", "--config", "--resume", "--output-dir"),
    *("--data-glob", "--eval-glob", "--dataset", "--dataset-config"),
    *("--tokenizer", "--init-from"),
    *("--steps", "--batch-size-sequences", "--sequence-length-tokens"),
    *("--optimizer", "--learning-rate", "--rank", "--mesh", "--seed"),
)
EXAMPLES = (
    Example("the default run: Moby Dick, in minutes on a laptop", ""),
    Example("resume it", "--resume"),
    Example(
        "your own text, with another optimizer",
        "--data-glob 'texts/**/*.txt' --optimizer adamw --output-dir runs/adamw",
    ),
    Example(
        "a published shape on C4, streamed",
        "--preset llama-60m --dataset allenai/c4 --dataset-config en "
        "--tokenizer t5-base --vocabulary-size 32128 --output-dir runs/c4-60m",
    ),
    Example(
        "continue training of weights in Hugging Face's layout",
        "--init-from path/to/llama --data-glob 'texts/*.txt' --output-dir runs/tuned",
    ),
)


def read(argv: Sequence[str]) -> PretrainConfig:
    """Parses the command line, with defaults from a preset or a saved config."""
    layout = {"common": COMMON, "examples": EXAMPLES}
    return command_line.parse(
        PRESETS, "tiny", PRETRAIN, argv, adapt=with_weights, **layout
    )


def with_weights(base: PretrainConfig, given: Origins) -> PretrainConfig:
    """Replaces the values that --init-from determines."""
    if given.init_from in (None, "None", "") or given.resume:
        return base
    from train.step import given_weights

    return given_weights.defaults(base, options.expanded(given.init_from))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    launch(argv, read, _run)


def _run(config: PretrainConfig) -> int:
    from train.loop import pretraining

    return pretraining.run(config)


if __name__ == "__main__":
    main()
