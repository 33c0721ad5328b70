"""Benchmarks time and memory of optimizers: `python -m train.benchmark --help`."""

import shlex
import sys
from collections.abc import Sequence

from train.cli import command_line
from train.cli.command_line import Example
from train.timing.benchmark_config import BenchmarkConfig

PROGRAM = "python -m train.benchmark"
EXAMPLES = (
    Example("updates of a model of 60 million parameters", ""),
    Example(
        "training steps of two optimizers, with a chart",
        "--measure step --optimizers adamw,subtrack --output runs/benchmark",
    ),
    Example(
        "only bytes and compile times, for a TPU that is not present",
        "--preset llama-1b --num-layers 1 --target tpu-v5e:2x2",
    ),
)


def read(argv: Sequence[str]) -> BenchmarkConfig:
    """Parses the command line."""
    return command_line.read(BenchmarkConfig, PROGRAM, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    config = read(argv)
    from train.timing import benchmarking

    benchmarking.run(config, shlex.join([*PROGRAM.split(), *argv]))


if __name__ == "__main__":
    main()
