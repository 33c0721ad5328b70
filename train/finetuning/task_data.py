"""Opens the data of a fine-tuning run: labels by name, splits, encoded rows."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn import model_selection

from models.encoder_config import EncoderConfig
from train.config.task_data_config import TaskDataConfig
from train.config.tasks import Task
from train.data.row_files import Table
from train.finetuning import encoded, examples, labels, tables
from train.finetuning.encoded import Split
from train.tokenization.pairs import PairTokenizer

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Encoded rows of a task.

    Attributes:
      task: the task.
      classes: names of the classes in the order of the model's outputs; of a choice,
        the candidates; () for regression.
      train: rows to train on.
      validation: rows to evaluate on; the first split selects the best checkpoint.
      test: labelled rows for one evaluation at the end.
      source: where the rows are from.
    """

    task: Task
    classes: tuple[str, ...]
    train: Split
    validation: tuple[Split, ...]
    test: tuple[Split, ...]
    source: str

    def answers(self, ids: np.ndarray) -> list[Any]:
        """Names of classes, or numbers as they are."""
        return answers(self.task, self.classes, ids)


def answers(task: Task, classes: Sequence[str], ids: np.ndarray) -> list[Any]:
    """Names of classes, or numbers as they are."""
    if task.head == "regression":
        return [float(value) for value in ids]
    return [classes[i] for i in ids]


def choose_classes(
    task: Task, names: Sequence[str | None], model: EncoderConfig, *, new_head: bool
) -> tuple[str, ...]:
    """Classes in the order of the model's outputs.

    Those of a head that the weights have, in its order, if the names are the same;
    else the task's, or those of the rows.

    Args:
      task: the task.
      names: classes of the training rows.
      model: shape of the weights.
      new_head: whether their head is replaced.

    Raises:
      ValueError: the head has other classes; or there are fewer than two.
    """
    if task.head == "regression":
        return ()
    own = task.labels or labels.sorted_names(names)
    if task.head == "classification" and model.labels and not new_head:
        if set(own) <= set(model.labels):
            return model.labels
        raise ValueError(
            f"the head of --init-from has the classes {', '.join(model.labels)}, the "
            f"rows {', '.join(own)}: name the labels of the rows as the model does, or "
            "give --new-head to train a new one"
        )
    if len(own) < 2:
        raise ValueError(
            f"all labels of the training rows are {''.join(own)!r}: a classifier needs "
            "rows of two classes"
        )
    return own


def open_data(
    data: TaskDataConfig,
    model: EncoderConfig,
    tokenizer: PairTokenizer,
    seed: int,
    *,
    new_head: bool,
    report: Report,
) -> TaskData:
    """Reads and encodes all splits of a task.

    Args:
      data: which rows.
      model: shape of the weights, with the classes of their head.
      tokenizer: encodes the rows.
      seed: decides which rows are held out.
      new_head: whether the weights' head is replaced.
      report: called with one-line warnings.

    Raises:
      ValueError: rows are unusable, or their classes do not fit the model.
      OSError: they cannot be read.
    """
    task = data.chosen_task
    found = tables.read_tables(data, task)
    train_name = "train" if data.files else task.train
    if train_name not in found.splits:
        raise ValueError(
            f"{found.source} has no split {train_name}, only {', '.join(found.splits)}"
        )
    if not task.fields:
        fields = ", ".join(map(repr, next(iter(found.splits[train_name].rows), {})))
        raise ValueError(
            f"give --text-field, the field with the text: the rows have {fields}"
        )
    reader = _Reader(task, found, tokenizer)
    if not found.splits[train_name].rows:
        raise ValueError(f"{found.where[train_name]} has no rows to train on")
    names = reader.names(train_name)
    classes = choose_classes(task, names, model, new_head=new_head)
    train = reader.split(train_name, classes, must_have_labels=True)
    _report_classes(task, train, classes, report)
    expected = ("validation",) if data.files else task.validation
    validation = [
        reader.split(name, classes, must_have_labels=True, seen=names)
        for name in expected
        if name in found.splits
    ]
    if not validation:
        train, held_out = hold_out(train, data.held_out_fraction, seed)
        validation = [held_out]
    test_names = ("test",) if data.files else task.test
    test = [
        reader.split(name, classes, seen=names)
        for name in test_names
        if name in found.splits
    ]
    for split in (train, *validation, *test):
        if count := int(split.truncated.sum()):
            report(
                f"{count:,} of {len(split):,} rows of {split.name} were "
                f"truncated to --max-length-tokens {data.max_length_tokens}"
            )
    labelled = tuple(split for split in test if split.is_labelled.any())
    return TaskData(task, classes, train, tuple(validation), labelled, found.source)


class _Reader:
    """Makes encoded splits of tables."""

    def __init__(self, task: Task, found: tables.Tables, tokenizer: PairTokenizer):
        self._task, self._found, self._tokenizer = task, found, tokenizer

    def names(self, name: str) -> list[str | None]:
        """Classes of the rows; none for regression."""
        if self._task.head == "regression":
            return []
        where = self._found.where[name]
        return labels.class_names(self._found.splits[name], self._task, where)

    def split(
        self,
        name: str,
        classes: Sequence[str],
        *,
        must_have_labels: bool = False,
        seen: Sequence[str | None] | None = None,
    ) -> Split:
        """Encodes a split; `seen` are the classes of training rows."""
        table, where = self._found.splits[name], self._found.where[name]
        if not table.rows:
            raise ValueError(f"{where} has no rows")
        return encode_table(
            table,
            self._task,
            classes,
            self._tokenizer,
            name,
            where,
            must_have_labels=must_have_labels,
            seen=seen,
        )


def encode_table(
    table: Table,
    task: Task,
    classes: Sequence[str],
    tokenizer: PairTokenizer,
    name: str,
    where: str,
    *,
    must_have_labels: bool = False,
    seen: Sequence[str | None] | None = None,
) -> Split:
    """Encodes the rows of a table.

    Args:
      table: the rows.
      task: arranges their texts.
      classes: names of the classes by the model's id.
      tokenizer: encodes them.
      name: name of the split.
      where: the rows' origin, for messages.
      must_have_labels: refuse rows without a label.
      seen: classes that occur in training; None: any.

    Raises:
      ValueError: a row lacks a field, or has an unknown class.
    """
    if task.head == "regression":
        ids = labels.numbers(table, task, where)
        is_labelled = np.isfinite(ids)
    else:
        names = labels.class_names(table, task, where)
        known = {each: index for index, each in enumerate(classes)}
        for number, each in enumerate(names, 1):
            if each is not None and each not in known:
                raise ValueError(
                    f"row {number} of {where}: class {each!r} is not one of "
                    f"{', '.join(classes)}, which the model tells apart"
                )
            if not task.labels and seen and each is not None and each not in seen:
                raise ValueError(
                    f"row {number} of {where}: no row of the training data has its "
                    f"class {each!r}"
                )
        ids = np.array([-1 if each is None else known[each] for each in names])
        ids = ids.astype(np.int32)
        is_labelled = ids >= 0
    if must_have_labels:
        labels.check_all_labelled(is_labelled.tolist(), table.rows, task, where)
    texts, candidates = examples.inputs(table.rows, task, where)
    return encoded.gather(
        name,
        tokenizer.encode(texts),
        candidates,
        ids,
        [row.get("idx", number) for number, row in enumerate(table.rows)],
        examples.groups(table.rows, task),
    )


def _report_classes(
    task: Task, train: Split, classes: Sequence[str], report: Report
) -> None:
    """Warns of classes without rows to train on."""
    if task.head == "regression":
        return
    counts = collections.Counter(train.labels.tolist())
    missing = [name for i, name in enumerate(classes) if not counts[i]]
    if missing and task.head == "classification":
        report(
            f"no row to train on is of class {', '.join(missing)}: the model will not "
            "learn to predict it"
        )


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Splits rows into those to train on and those to evaluate on, by class.

    Args:
      split: the rows.
      fraction: share to evaluate on, of each class alike; classes of one row are
        trained on.
      seed: decides which rows.

    Raises:
      ValueError: there are too few rows.
    """
    rows, strata, least = np.arange(len(split)), None, 1
    alone = np.empty(0, np.int64)
    if split.labels.dtype != np.float32:
        counts = collections.Counter(split.labels.tolist())
        is_alone = np.array([counts[each] < 2 for each in split.labels.tolist()])
        alone, rows = rows[is_alone], rows[~is_alone]
        strata = split.labels[rows]
        least = len(set(strata.tolist()))
    count = max(round(fraction * len(rows)), least)
    try:
        train, held_out = model_selection.train_test_split(
            rows, test_size=count, random_state=seed, stratify=strata
        )
    except ValueError as error:
        raise ValueError(
            f"{len(split)} rows are too few to hold out --held-out-fraction {fraction} "
            "of each class: give more, a smaller fraction, or --validation-file"
        ) from error
    train = np.sort(np.concatenate([train, alone]))
    return split.part(train, split.name), split.part(np.sort(held_out), "held out")
