"""Configuration of `train.predict`."""

import dataclasses
import pathlib
from typing import Literal

from train.config.rules import check, steps_of_32_bits
from train.config.run_config import BEST_OR_NEWEST, CheckpointChoice, CompilationConfig
from train.config.tasks import find_task

PREDICT = "python -m train.predict"


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Predicts rows with a fine-tuned model, and writes a benchmark's submission.

    Files are named and written as GLUE and SuperGLUE take them; rows with labels are
    also scored.

    Attributes:
      checkpoint: --output-dir of a run of train.finetune.
      split: rows to predict: validation or test of the run's task or files.
      file: file with rows to predict instead (.jsonl, .json, .csv, .tsv, .parquet).
      output_dir: directory for the files with predictions.
      task: another task with the same classes: ax for a model of mnli, axb and axg for
        one of rte. None: the run's.
      dataset: dataset with the rows, as for train.finetune. None: the task's, or the
        run's.
      dataset_config: configuration of the dataset. None: the task's.
      dataset_revision: branch, tag or commit of the dataset on the hub.
      text_field: field with the text. None: as in the run, or the task's.
      pair_field: field with the second text. None: as in the run, or the task's.
      batch_size_examples: rows per batch.
      choice: which checkpoint.
      start: settings of the process.
    """

    checkpoint: pathlib.Path
    split: Literal["validation", "test"] = "test"
    file: str | None = None
    output_dir: pathlib.Path = pathlib.Path("predictions")
    task: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    text_field: str | None = None
    pair_field: str | None = None
    batch_size_examples: int = 64
    choice: CheckpointChoice = BEST_OR_NEWEST
    start: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)

    def __post_init__(self):
        check(self, steps_of_32_bits, "batch_size_examples")
        if self.task is not None:
            find_task(self.task)
        if self.file is not None and self.dataset is not None:
            raise ValueError(
                f"--file {self.file} and --dataset {self.dataset} exclude each other: "
                "give one of them"
            )
