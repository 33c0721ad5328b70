"""The configuration of a comparison."""

import dataclasses
import pathlib
import typing
from typing import Annotated

import tyro

from train.config.optimizer_config import OptimizerConfig, OptimizerName
from train.config.pretrain_config import PresetName, TextTask
from train.config.rules import check, check_name, fits_32_bits, flag, positive
from train.config.run_config import CompilationConfig


@dataclasses.dataclass(frozen=True)
class Settings(OptimizerConfig):
    """Settings of all methods unless a variant gives its own.

    Those that are searched, or are another argument, cannot be given.
    """

    name: Annotated[OptimizerName, tyro.conf.Suppress] = "subtrack"
    learning_rate: Annotated[float, tyro.conf.Suppress] = 1e-3
    scale: Annotated[float | None, tyro.conf.Suppress] = None
    matrix_learning_rate_scale: Annotated[float, tyro.conf.Suppress] = 1.0


def method_of(text: str) -> tuple[str, str]:
    """Splits one of `--optimizers` at the colon: method and settings.

    Raises:
      ValueError: there is no such method.
    """
    name, _, rest = text.strip().partition(":")
    check_name(f"--optimizers {text!r}", name, typing.get_args(OptimizerName))
    return name, rest


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Trains the same model on the same batches with several optimizers and rates.

    Every method is trained with each combination of learning rate, factor on the
    updates of attention and MLP matrices, and seed; the table shows each method at the
    rates of its least mean loss. Finished trials are kept: the same command, or one
    with more values, continues where the last one stopped. The values below are those
    of the chosen preset.

    Attributes:
      task: settings that all trials share.
      preset: where all other values come from unless given, as for train.pretrain.
      optimizers: the methods, optionally with settings of their own, which are then
        not searched: adamw:b2=0.95 subtrack:update_interval=50,scale=0.5. static is
        subtrack without tracking: the difference is what tracking gains.
      learning_rates: peak learning rates to try.
      matrix_scales: factors on the updates of matrices to try: scale of the low-rank
        methods with subspaces, matrix_learning_rate_scale of the others.
      seeds: each determines initial parameters, order of the data and random subspaces,
        the same for all methods.
      sweep: settings to vary one at a time, each with a table of its own:
        rank=16,32,64 transport=on,off. Methods without the setting are shown
        unchanged.
      tuning_seeds: number of seeds, from the first, on which rates are searched; the
        other seeds are run at the best rates of these alone. None: all seeds.
      output_dir: directory of the comparison: table.md, loss.png, results.json, and a
        record of each trial.
      settings: settings of all methods unless --optimizers gives others.
      start: how to begin.
    """

    task: TextTask
    preset: PresetName = "tiny"
    optimizers: tuple[str, ...] = ("adamw", "muon", "galore", "static", "subtrack")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    matrix_scales: tuple[float, ...] = (0.25, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: tuple[str, ...] = ()
    tuning_seeds: int | None = None
    output_dir: pathlib.Path = pathlib.Path("runs/compare")
    settings: Settings = Settings()
    start: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)

    def __post_init__(self):
        for name in ("optimizers", "learning_rates", "matrix_scales", "seeds", "sweep"):
            values = getattr(self, name)
            if not values and name != "sweep":
                raise ValueError(f"{flag(name)} must have at least one value")
            if len(set(values)) < len(values):
                shown = " ".join(map(str, values))
                raise ValueError(f"{flag(name)} has a value twice: {shown}")
        for text in self.optimizers:
            method_of(text)
        check(self, positive, "learning_rates", "matrix_scales")
        check(self, fits_32_bits, "seeds")
        most, tuning = len(self.seeds), self.tuning_seeds
        if tuning is not None and not 1 <= tuning <= most:
            raise ValueError(
                "--tuning-seeds must be at least 1 and at most the number of --seeds, "
                f"{most}, got {tuning}"
            )
