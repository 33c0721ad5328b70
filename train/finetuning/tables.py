"""Reads the splits of a task: from the hub, a local directory, or files."""

import itertools
import logging
import pathlib
import re
from typing import NamedTuple

from train.config.task_data_config import TaskDataConfig
from train.config.tasks import Task
from train.data.row_files import Table, class_names, read_rows
from train.data.sources import fingerprint

_NO_DATA = (
    "there is nothing to train on: give a task of GLUE or SuperGLUE, read from the hub "
    "(--task mrpc), a dataset (--dataset NAME or DIRECTORY), or files of your own "
    "(--train-file rows.jsonl --text-field text --label-field label)"
)
# Other names of a split's files.
_SHORT_NAMES = {"validation": ("validation", "val", "dev")}


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
    name = data.dataset or task.dataset
    config = data.dataset_config
    if config is None and task.dataset is not None:
        config = task.config
    flags = f"--dataset {name}" + (f" --dataset-config {config}" if config else "")
    directory = pathlib.Path(name).expanduser()
    if directory.is_dir() and not (directory / "README.md").exists():
        own = directory / (config or "")
        found = _read_directory(own if own.is_dir() else directory, task, flags)
    else:
        is_local = directory.is_dir()
        place = str(directory) if is_local else name
        found = load_dataset(place, config, data.dataset_revision, flags)
    where = {split: f"split {split} of {flags}" for split in found}
    return Tables(found, where, f"{name}, {config}" if config else name)


def _read_directory(
    directory: pathlib.Path, task: Task, flags: str
) -> dict[str, Table]:
    """Reads files named by their split: train.jsonl, test_matched-00000.parquet.

    datasets would take both validation splits of MNLI for one.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    found = {}
    for split in (task.train, *task.validation, *task.test):
        names = _SHORT_NAMES.get(split, (split,))
        own = [path for path in files if re.split("[-.]", path.name)[0] in names]
        tables = [read_rows(path, f"{flags}: {path}") for path in own]
        if tables:
            rows = list(itertools.chain.from_iterable(each.rows for each in tables))
            found[split] = Table(rows, tables[0].class_names)
    if not found:
        raise ValueError(
            f"{flags}: {directory} has no files named by a split, such as "
            f"{task.train or task.test[0]}.jsonl"
        )
    return found


def load_dataset(
    place: str, config: str | None, revision: str | None, flags: str
) -> dict[str, Table]:
    """Loads all splits of a dataset on the hub or in a directory.

    Args:
      place: its name or the directory.
      config: its configuration.
      revision: branch, tag or commit on the hub.
      flags: the flags that name it, for messages.

    Raises:
      ValueError, OSError: it cannot be opened.
    """
    import datasets

    datasets.disable_progress_bars()
    # Each attempt to reach the hub would be a line of its own.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        found = datasets.load_dataset(place, config, revision=revision)
    except Exception as error:  # whatever the reading library raises
        raise _explained(error, flags) from error
    return {
        split: Table(list(rows), class_names(rows.features))
        for split, rows in found.items()
    }


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
