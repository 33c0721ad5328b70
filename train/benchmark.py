"""Seconds and bytes of optimizers: `python -m train.benchmark --help`."""

import dataclasses
import pathlib
import shlex
import sys
import typing
from collections.abc import Sequence
from typing import Literal

from train.cli import command_line
from train.cli.command_line import Example
from train.config.optimizer_config import OptimizerName
from train.config.rules import at_least_1, check, check_name
from train.config.run_config import Layout, PresetName, Switch

PROGRAM = "python -m train.benchmark"
# Ours have the names that they have in train.pretrain.
_OPTAX = ("adamw", "adafactor", "optax-galore", "optax-muon")
_NOT_OURS = {*_OPTAX, "muon", "static"}
NAMES = (*_OPTAX, *(n for n in typing.get_args(OptimizerName) if n not in _NOT_OURS))
DEFAULT = "adamw,optax-galore,optax-muon,adafactor,subtrack,grass-walk,grass-jump"
EXAMPLES = (
    Example("updates of a model of 60 million parameters", ""),
    Example(
        "whole training steps of two optimizers, with a picture",
        "--measure step --optimizers adamw,subtrack --output runs/benchmark",
    ),
    Example(
        "bytes and compile times alone, for a TPU that is not there",
        "--preset llama-1b --num-layers 1 --target tpu-v5e:2x2",
    ),
)


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Times optimizers in one process, interleaved.

    Every round runs every optimizer once; ratios are taken within rounds, so that
    what else the machine does cancels. The first optimizer is the measure of the
    others.

    Attributes:
      preset: whose shapes, rank and update interval are used.
      optimizers: names with commas, the first being what the others are compared
        with: adamw, adafactor, optax-galore, optax-muon (optax' own), and ours by
        their names in train.pretrain.
      measure: update is an optimizer's update and its application; step a whole step
        of training.
      layout: of the parameters in an update: one array for every kernel (unstacked),
        or one for the kernels of all layers (stacked), as our model has them.
      dtype: of parameters and gradients, and of the model's arithmetic.
      num_layers: layers of the model; None: the preset's. Fewer leave room for
        several optimizers at a time.
      rank: columns of each basis; None: the preset's.
      update_interval: steps between refreshes; None: the preset's.
      sequence_length_tokens: tokens of a sequence, for measure=step.
      batch_size_sequences: sequences of a batch, for measure=step.
      rounds: that are timed, of steady steps.
      refresh_rounds: likewise of steps that move the subspace, and of first steps.
      compile_rounds: times that every program is compiled.
      shapes_only: compile and count bytes, run nothing.
      target: devices that need not be there, to compile for, e.g. tpu-v5e:2x2 (see
        train.plan; one of them is used). Nothing is run.
      backend: cpu, gpu or tpu; None: JAX' choice.
      output: file to write, without ending: numbers go to .json, bars to .png.
    """

    preset: PresetName = "llama-60m"
    optimizers: str = DEFAULT
    measure: Literal["update", "step"] = "update"
    layout: Layout = "unstacked"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_layers: int | None = None
    rank: int | None = None
    update_interval: int | None = None
    sequence_length_tokens: int = 256
    batch_size_sequences: int = 16
    rounds: int = 20
    refresh_rounds: int = 5
    compile_rounds: int = 1
    shapes_only: Switch = False
    target: str | None = None
    backend: Literal["cpu", "gpu", "tpu"] | None = None
    output: pathlib.Path | None = None

    def __post_init__(self):
        for field in ("num_layers", "rank", "update_interval"):
            if getattr(self, field) is not None:
                check(self, at_least_1, field)
        check(self, at_least_1, "rounds", "refresh_rounds", "compile_rounds")
        check(self, at_least_1, "sequence_length_tokens", "batch_size_sequences")
        for name in self.names:
            check_name(f"--optimizers {self.optimizers!r}", name, NAMES)

    @property
    def names(self) -> list[str]:
        """The optimizers, each once."""
        return list(dict.fromkeys(name.strip() for name in self.optimizers.split(",")))


def read(argv: Sequence[str]) -> BenchmarkConfig:
    """The command line."""
    return command_line.read(BenchmarkConfig, PROGRAM, argv, examples=EXAMPLES)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    config = read(argv)
    from train.timing import benchmarking

    benchmarking.run(config, shlex.join([*PROGRAM.split(), *argv]))


if __name__ == "__main__":
    main()
