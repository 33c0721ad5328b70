"""Labels of rows by name: from strings, class names of a dataset, or numbers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.config.tasks import Task
from train.data.row_files import Table

_HIDDEN = -1  # the benchmarks' number for a label that is not public


def class_names(table: Table, task: Task, where: str) -> list[str | None]:
    """Name of each row's class; None where it is hidden or missing.

    Numbers stand for the names that the dataset has, else for the task's in their
    order; of custom classes they are the names themselves.

    Args:
      table: the rows.
      task: the task.
      where: the rows' origin, for messages.

    Raises:
      ValueError: a label is no class.
    """
    known = table.class_names.get(task.label_field, task.labels)
    found = []
    for number, row in enumerate(table.rows, 1):
        value = row.get(task.label_field)
        try:
            found.append(_name(value, known, task))
        except ValueError as error:
            raise ValueError(
                f"row {number} of {where}: label {value!r} {error}"
            ) from error
    return found


def _name(value: Any, known: Sequence[str], task: Task) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        value = str(value)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("is missing (NaN); leave such rows out")
    if isinstance(value, float):
        raise ValueError(
            "is a number with decimals where classes are: --task stsb or "
            "custom-regression predicts numbers"
        )
    if isinstance(value, str):
        lower = {name.lower(): name for name in known}
        if not known or value in known:
            return value
        if value.lower() in lower:
            return lower[value.lower()]
        if not value.lstrip("-").isdecimal():
            raise ValueError(f"is not one of {', '.join(known)}")
        value = int(value)
    if not isinstance(value, int):
        raise ValueError(f"is {type(value).__name__}, not a class")
    if value == _HIDDEN:
        return None
    if not known:
        return str(value)
    if not 0 <= value < len(known):
        raise ValueError(
            f"is not one of the {len(known)} classes {', '.join(known)} of --task "
            f"{task.name}, numbered from 0"
        )
    return known[value]


def numbers(table: Table, task: Task, where: str) -> np.ndarray:
    """Numbers to predict, float32 of (rows,); NaN where they are hidden or missing.

    Raises:
      ValueError: a label is no finite number.
    """
    found = []
    for number, row in enumerate(table.rows, 1):
        value = row.get(task.label_field)
        try:
            given = math.nan if value is None or value == "" else float(value)
            if value is not None and value != "" and not math.isfinite(given):
                raise ValueError
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"row {number} of {where}: label {value!r} is no finite number"
            ) from error
        # STS-B's numbers are from 0 to 5.
        is_hidden = task.dataset is not None and given < 0
        found.append(math.nan if is_hidden else given)
    return np.array(found, np.float32)


def check_all_labelled(
    is_labelled: Sequence[bool], rows: Sequence[dict], task: Task, where: str
) -> None:
    """Raises a ValueError that names the first row without a label."""
    if all(is_labelled):
        return
    number = list(is_labelled).index(False)
    row = rows[number]
    if task.label_field not in row:
        raise ValueError(
            f"row {number + 1} of {where} has no field {task.label_field!r}, only "
            f"{', '.join(map(repr, row))}; name the one with the label by --label-field"
        )
    raise ValueError(
        f"row {number + 1} of {where} has no label: {task.label_field} is "
        f"{row[task.label_field]!r}; leave such rows out"
    )


def sorted_names(names: Sequence[str | None]) -> tuple[str, ...]:
    """Distinct names in order, whole numbers by their value.

    >>> sorted_names(["10", "9", None, "9"])
    ('9', '10')
    """
    distinct = {name for name in names if name is not None}
    if all(name.isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))
