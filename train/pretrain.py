"""Pre-trains a LLaMA on text: `python -m train.pretrain --help`."""

import io
import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.config.presets import PRESETS
from train.config.pretrain_config import PRETRAIN, PretrainConfig
from train.system import cluster, console

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
    return command_line.parse(PRESETS, "tiny", PRETRAIN, argv, **layout)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    # errors="replace": samples may contain characters that the terminal cannot encode.
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line buffering: a second Ctrl-C exits without flushing.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    start = cluster.find_processes(argv)
    if start is None:
        sys.exit(_run(read(argv)))
    from train.system import processes

    # Connect first, so that an error in one process reaches the others.
    with console.user_errors(ValueError), processes.connected(start):
        with console.user_errors(ValueError), processes.together(ValueError):
            config = read(argv)
        sys.exit(_run(config))


def _run(config: PretrainConfig) -> int:
    from train.loop import pretraining

    return pretraining.run(config)


if __name__ == "__main__":
    main()
