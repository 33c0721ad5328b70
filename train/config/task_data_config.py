"""Configuration of the labelled data of a fine-tuning run: source, fields, batches."""

import dataclasses

from train.config.data_config import Source
from train.config.rules import at_least_1, between_0_and_1, check, steps_of_32_bits
from train.config.tasks import Task, find_task


@dataclasses.dataclass(frozen=True)
class TaskDataConfig:
    """Labelled rows and batches.

    Attributes:
      task: one of GLUE (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli) or
        SuperGLUE (boolq, cb, copa, multirc, wic, wsc, superglue-rte): its fields,
        labels and metrics, and its data on the hub unless files or a dataset are given.
        ax, axb and axg only evaluate (train.predict). custom: classes, with
        --text-field; custom-regression: numbers. None: custom.
      dataset: Hugging Face dataset to read instead of the task's own, by its name on
        the hub or the path of a local directory with the files of its splits (.parquet,
        .jsonl, .csv).
      dataset_config: configuration of the dataset. None: the task's.
      dataset_revision: branch, tag or commit of the dataset on the hub.
      train_file: rows to train on: .jsonl, .json, .csv, .tsv or .parquet.
      validation_file: rows to evaluate on during training. None: held_out_fraction of
        the training rows.
      test_file: rows for one evaluation at the end, with the best model.
      text_field: field of rows with the text. None: the task's.
      pair_field: field with the second text. None: the task's; for custom, there is
        none.
      label_field: field with the label: a class' name or number, or a number to
        predict. None: the task's, label.
      held_out_fraction: fraction of the training rows to evaluate on if there is no
        validation split, of each class alike, drawn by the seed.
      max_length_tokens: longer rows are truncated, the longer text of a pair first.
      length_buckets: number of lengths to which batches are padded: the maximum, its
        half, and so on. Each one is compiled.
      batch_size_examples: rows per optimizer step on all devices together.
      eval_batch_size_examples: rows per batch of an evaluation.
    """

    task: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_field: str | None = None
    pair_field: str | None = None
    label_field: str | None = None
    held_out_fraction: float = 0.1
    max_length_tokens: int = 128
    length_buckets: int = 5
    batch_size_examples: int = 32
    eval_batch_size_examples: int = 64

    def __post_init__(self):
        check(self, between_0_and_1, "held_out_fraction")
        check(self, at_least_1, "length_buckets")
        check(self, steps_of_32_bits, "batch_size_examples", "eval_batch_size_examples")
        if self.max_length_tokens < 4:
            raise ValueError(
                f"--max-length-tokens must be at least 4, got {self.max_length_tokens}"
            )
        if self.task is not None:
            find_task(self.task)
        if self.files and self.dataset is not None:
            raise ValueError(
                f"--dataset {self.dataset!r} and {next(iter(self.files))} exclude each "
                "other: give one of them"
            )
        if self.dataset is None and self.dataset_config is not None and self.files:
            raise ValueError(
                f"--dataset-config {self.dataset_config} is a setting of datasets, not "
                "of files"
            )

    @property
    def chosen_task(self) -> Task:
        """The task, with the given fields in place of its own.

        Raises:
          ValueError: the fields do not fit the task.
        """
        task = find_task(self.task or "custom")
        changed = {}
        if self.label_field is not None:
            changed["label_field"] = self.label_field
        if self.text_field is None and self.pair_field is None:
            return dataclasses.replace(task, **changed)
        if task.form != "texts":
            raise ValueError(
                f"--task {task.name} builds its input from the fields "
                f"{', '.join(task.fields)}: rename those of the rows, and leave out "
                "--text-field and --pair-field"
            )
        if self.pair_field is not None and len(task.fields) == 1:
            raise ValueError(
                f"--pair-field {self.pair_field}: --task {task.name} is of single "
                "texts; leave it out, or give --task custom"
            )
        first, second = (*task.fields, None, None)[:2]
        given = (self.text_field or first, self.pair_field or second)
        fields = tuple(name for name in given if name is not None)
        return dataclasses.replace(task, fields=fields, **changed)

    @property
    def files(self) -> dict[str, str]:
        """Given files by their flags."""
        names = ("train_file", "validation_file", "test_file")
        found = {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}
        return {name: path for name, path in found.items() if path is not None}

    @property
    def sources(self) -> dict[str, Source]:
        """Files that a run reads, by the setting that names them."""
        found = {
            f"data.{name[2:].replace('-', '_')}": Source("file", path)
            for name, path in self.files.items()
        }
        if self.dataset is not None:
            found["data.dataset"] = Source("directory", self.dataset)
        return found

    @property
    def has_own_evaluation(self) -> bool:
        """Whether the rows of evaluations are apart from those of training."""
        return self.validation_file is not None


def check_examples(data: TaskDataConfig, parts: int) -> None:
    """Raises a ValueError if batches cannot be split into equal parts."""
    if data.batch_size_examples % parts:
        raise ValueError(
            f"--batch-size-examples {data.batch_size_examples} must be a multiple of "
            f"--gradient-accumulation-steps {parts}"
        )
