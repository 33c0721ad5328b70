"""Reads the splits of a task: from the hub, a local directory, or files."""

import pathlib
from typing import Any, NamedTuple

from train.config.task_data_config import TaskDataConfig
from train.config.tasks import GLUE, SUPERGLUE, Task
from train.data.row_files import Table, class_names, read_rows
from train.data.sources import fingerprint

_NO_DATA = (
    "there is nothing to train on: give a task of GLUE or SuperGLUE, read from the hub "
    "(--task mrpc), a dataset (--dataset NAME or DIRECTORY), or files of your own "
    "(--train-file rows.jsonl --text-field text --label-field label)"
)


class Tables(NamedTuple):
    """Rows of a task by split, and where they are from.

    Attributes:
      splits: the rows by the split's name; with files train, validation and test.
      where: origin of each split, for messages.
      source: origin of all of them, for results: never the same for other rows.
    """

    splits: dict[str, Table]
    where: dict[str, str]
    source: str


def read_tables(data: TaskDataConfig, task: Task) -> Tables:
    """Reads all splits that there are.

    Raises:
      ValueError: there is no data to train on, or it cannot be parsed.
      OSError: it cannot be read.
    """
    if data.files:
        return _read_files(data)
    name = data.dataset or task.dataset
    if name is None:
        raise ValueError(_NO_DATA)
    if task.train is None:
        raise ValueError(
            f"--task {task.name} only evaluates models: train one for {task.model}, "
            f"then python -m train.predict --task {task.name} --checkpoint RUN"
        )
    return read_dataset(data, task)


def _read_files(data: TaskDataConfig) -> Tables:
    if data.train_file is None:
        flag = next(iter(data.files))
        raise ValueError(f"{flag} needs --train-file: there is nothing to train on")
    splits, where, sources = {}, {}, []
    for flag, value in data.files.items():
        path, split = pathlib.Path(value).expanduser(), flag[2:].removesuffix("-file")
        where[split] = f"{flag} {value}"
        splits[split] = read_rows(path, where[split])
        (known,) = fingerprint([path])
        sources.append(f"{known['name']} ({known['crc32']:08x})")
    return Tables(splits, where, ", ".join(sources))


def read_dataset(data: TaskDataConfig, task: Task) -> Tables:
    """Reads the splits of a dataset on the hub or in a directory.

    Raises:
      ValueError: it has no such configuration, or its rows cannot be parsed.
      OSError: there is no such dataset, or it cannot be reached.
    """
    import datasets

    name = data.dataset or task.dataset
    config = data.dataset_config
    if config is None and (data.dataset is None or task.dataset is not None):
        config = task.config
    flags = f"--dataset {name}" + (f" --dataset-config {config}" if config else "")
    source, directory = f"{name}, {config}" if config else name, None
    if pathlib.Path(name).expanduser().is_dir():
        directory = pathlib.Path(name).expanduser()
        # Copies without the hub's README have a directory for each configuration.
        if config is not None and (directory / config).is_dir():
            directory, config = directory / config, None
        elif not (directory / "README.md").exists():
            config = None
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(
            str(directory or name), config, revision=data.dataset_revision
        )
    except Exception as error:  # whatever the reading library raises
        raise _explained(error, flags) from error
    splits = {
        split: Table(list(rows), class_names(rows.features))
        for split, rows in found.items()
    }
    where = {split: f"split {split} of {flags}" for split in splits}
    return Tables(splits, where, source)


def _explained(error: Exception, flags: str) -> Exception:
    kind = OSError if isinstance(error, OSError) else ValueError
    reason = " ".join(str(error).split())
    advice = ""
    if "script" in reason.lower():
        advice = (
            "; loading scripts are not run: give --dataset-revision of a version in "
            "Parquet (refs/convert/parquet), or --dataset with a local directory of "
            ".parquet or .jsonl files"
        )
    elif isinstance(error, OSError) or "hub" in reason.lower():
        advice = (
            "; without the hub, give --dataset with a local directory, or --train-file"
        )
    return kind(f"cannot open {flags}: {reason[:300]}{advice}")


def is_benchmark(data: TaskDataConfig, task: Task) -> bool:
    """Whether rows are the benchmark's own, whose test labels are hidden."""
    name: Any = data.dataset or task.dataset
    return not data.files and name in (GLUE, SUPERGLUE)
