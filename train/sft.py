"""Fine-tunes a LLaMA on conversations: `python -m train.sft --help`."""

from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.cli.launch import launch
from train.config.sft_config import PRESETS, SFT, SftConfig

COMMON = (
    *("--preset", "--config", "--resume", "--output-dir", "--init-from"),
    *("--data-glob", "--eval-glob", "--dataset", "--format", "--template"),
    *("--loss-on", "--packing", "--skip-bad-rows", "--epochs", "--steps"),
    *("--batch-size-sequences", "--sequence-length-tokens"),
    *("--optimizer", "--learning-rate", "--rank", "--mesh", "--seed"),
)
EXAMPLES = (
    Example(
        "your own conversations, with a small model from the hub",
        "--init-from HuggingFaceTB/SmolLM2-135M-Instruct --data-glob chats.jsonl",
    ),
    Example("resume it", "--resume"),
    Example(
        "LLaMA 2 on Alpaca with the published settings",
        "--preset llama2-7b-alpaca --init-from path/to/llama-2-7b",
    ),
    Example(
        "several conversations a row, bad rows left out",
        "--init-from path/to/llama --data-glob 'chats/*.jsonl' --packing packed "
        "--skip-bad-rows",
    ),
)


def read(argv: Sequence[str]) -> SftConfig:
    """Parses the command line, with defaults from a preset or a saved config."""
    layout = {"common": COMMON, "examples": EXAMPLES}
    return command_line.parse(
        PRESETS, "default", SFT, argv, adapt=command_line.with_given_lengths, **layout
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    launch(argv, read, _run)


def _run(config: SftConfig) -> int:
    from train.finetuning import sft_running

    return sft_running.run(config)


if __name__ == "__main__":
    main()
