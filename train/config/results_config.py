"""Configuration of `train.results`."""

import dataclasses
import pathlib
from typing import Annotated

import tyro

RESULTS = "python -m train.results"


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
    """Prints tables of fine-tuning runs: mean and standard deviation over seeds.

    Runs on other rows, or from other weights, are in tables of their own.

    Attributes:
      runs: directories of runs of train.finetune.
    """

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]

    def __post_init__(self):
        if not self.runs:
            raise ValueError("give the directories of runs: train.results runs/*")
        paths = [path.absolute() for path in self.runs]
        if twice := {str(path) for path in paths if paths.count(path) > 1}:
            raise ValueError(f"{min(twice)} is given twice")
