"""Rows of a task as texts, labels and groups."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from train.config.tasks import Task
from train.data.formats import get_text, valid_text
from train.data.row_files import Row
from train.tokenization.pairs import Texts

# What COPA asks about the premise.
_QUESTIONS = {"cause": "What was the cause?", "effect": "What happened as a result?"}


class Inputs(NamedTuple):
    """Texts of rows.

    Attributes:
      texts: inputs of all rows, one after the other; each has as many as there are
        candidates.
      candidates: inputs per row: 1, or the choices of a `choice` task.
    """

    texts: list[Texts]
    candidates: int


def inputs(rows: Iterable[Row], task: Task, where: str) -> Inputs:
    """Texts of rows as the task arranges them.

    Args:
      rows: the rows.
      task: the task.
      where: the rows' origin, for messages.

    Raises:
      ValueError: a row lacks a field, or it holds no text.
    """
    render, candidates = _RENDERERS[task.form], 1
    if task.form == "choice":
        candidates = len(task.labels)
    texts = []
    for number, row in enumerate(rows, 1):
        texts += render(_Reader(row, f"row {number} of {where}", task), task)
    return Inputs(texts, candidates)


class _Reader:
    """Fields of a row, with errors that name it."""

    def __init__(self, row: Row, where: str, task: Task):
        self.row, self.where, self.task = row, where, task

    def __call__(self, field: str) -> str:
        if field not in self.row:
            fields = ", ".join(map(repr, self.row))
            advice = "name others by --text-field and --pair-field"
            if self.task.form != "texts":
                advice = f"--task {self.task.name} needs {', '.join(self.task.fields)}"
            raise ValueError(
                f"{self.where} has no field {field!r}, only {fields}; {advice}"
            )
        return valid_text(get_text(self.row, field, self.where))


def _texts(read: _Reader, task: Task) -> list[Texts]:
    first, second = (*task.fields, None)[:2]
    return [(read(first), None if second is None else read(second))]


def _choice(read: _Reader, task: Task) -> list[Texts]:
    asked = read("question")
    if asked not in _QUESTIONS:
        raise ValueError(f"{read.where}: question {asked!r} is not cause or effect")
    premise = f"{read('premise')} {_QUESTIONS[asked]}"
    return [(premise, read(name)) for name in task.labels]


def _answer(read: _Reader, task: Task) -> list[Texts]:
    del task
    return [(read("paragraph"), f"{read('question')} {read('answer')}")]


def _word(read: _Reader, task: Task) -> list[Texts]:
    del task
    return [(f"{read('word')}: {read('sentence1')}", read("sentence2"))]


def _spans(read: _Reader, task: Task) -> list[Texts]:
    """Quotes the two spans of WSC; indices count words between spaces."""
    del task
    words = read("text").split(" ")
    marks = []
    for name in ("span1", "span2"):
        length = len(read(f"{name}_text").split(" "))
        index = read.row.get(f"{name}_index")
        if not isinstance(index, int | str) or not str(index).isdecimal():
            raise ValueError(f"{read.where}: {name}_index {index!r} is no word's index")
        marks.append((int(index), length))
    # From the last one on, so that the indices before it stay.
    for index, length in sorted(marks, reverse=True):
        words[index : index + length] = [f'"{" ".join(words[index : index + length])}"']
    return [(" ".join(words), None)]


_RENDERERS: dict[str, Callable[[_Reader, Task], list[Texts]]] = {
    "texts": _texts,
    "choice": _choice,
    "answer": _answer,
    "word": _word,
    "spans": _spans,
}


def groups(rows: Iterable[Row], task: Task) -> list[Any] | None:
    """Group of each row: a question of MultiRC, a pair of AX-g; None for other tasks.

    A pair of AX-g without `pair_id` is two rows with successive indices.
    """
    if task.group_field is None:
        return None
    found = []
    for number, row in enumerate(rows):
        index = row.get(task.group_field, number)
        if isinstance(index, dict):
            index = (index.get("paragraph"), index.get("question"))
        elif task.form != "answer":
            index = row.get("pair_id", int(index) // 2)
        found.append(index)
    return found
