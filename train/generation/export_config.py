"""The configuration of an export."""

import dataclasses
import pathlib
from typing import Literal

from train.config.run_config import BEST_OR_NEWEST, CheckpointChoice, CompilationConfig


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Exports a checkpoint of a run in a format of other programs.

    Attributes:
      checkpoint: --output-dir of the run.
      to: format; hf: safetensors, config.json and tokenizer, as transformers loads.
      output_dir: directory to write to. None: a directory with the format's name in
        the run's directory.
      choice: which checkpoint.
      start: settings of the process.
    """

    checkpoint: pathlib.Path
    to: Literal["hf"] = "hf"
    output_dir: pathlib.Path | None = None
    choice: CheckpointChoice = BEST_OR_NEWEST
    start: CompilationConfig = dataclasses.field(default_factory=CompilationConfig)
