"""The configuration of a benchmark."""

import dataclasses
import pathlib
import typing
from typing import Literal

from train.config.optimizer_config import OptimizerName
from train.config.pretrain_config import PresetName
from train.config.rules import at_least_1, check, check_name
from train.config.run_config import Switch

# Kernels of all layers in one array, or one array per layer.
Layout = Literal["stacked", "unstacked"]
# Other names are those of train.pretrain.
_OPTAX = ("adamw", "adafactor", "optax-galore", "optax-muon")
_NOT_OURS = {*_OPTAX, "muon", "static"}
NAMES = (*_OPTAX, *(n for n in typing.get_args(OptimizerName) if n not in _NOT_OURS))
DEFAULT = "adamw,optax-galore,optax-muon,adafactor,subtrack,grass-walk,grass-jump"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Times optimizers in one process, interleaved.

    Every round runs every optimizer once; ratios are taken within rounds, so that
    other load on the machine cancels. Ratios are to the first optimizer.

    Attributes:
      preset: source of shapes, rank and update interval.
      optimizers: names separated by commas, the first one is the baseline: adamw,
        adafactor, optax-galore, optax-muon (optax's own), and ours by their names in
        train.pretrain.
      measure: update: an optimizer's update and its application; step: a training
        step with the model.
      layout: parameters of an update: one array per kernel (unstacked), or one for the
        kernels of all layers (stacked), as in our model.
      dtype: dtype of parameters, gradients, and the model's computation.
      num_layers: layers of the model; None: the preset's. All optimizers are in memory
        at a time, so large models need fewer layers.
      rank: columns of each basis; None: the preset's.
      update_interval: steps between refreshes; None: the preset's.
      sequence_length_tokens: tokens per sequence, for measure=step.
      batch_size_sequences: sequences per batch, for measure=step.
      rounds: timed rounds of steady steps.
      refresh_rounds: timed rounds of steps with a refresh, and of first steps.
      compile_rounds: number of compilations of every program.
      shapes_only: compile and count bytes, run nothing.
      target: devices to compile for that are not present, e.g. tpu-v5e:2x2 (see
        train.plan; one device is used). Nothing is run.
      backend: cpu, gpu or tpu; None: JAX's choice.
      output: path without suffix: numbers are written to .json, bars to .png.
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
        """Names of the optimizers, without duplicates."""
        return list(dict.fromkeys(name.strip() for name in self.optimizers.split(",")))
