"""Files of predictions in the formats of GLUE and SuperGLUE."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.config.tasks import Task

# The range of STS-B, outside of which its server refuses a submission.
_RANGE = (0.0, 5.0)


def file_name(task: Task, split: str) -> str:
    """Name of the benchmark's file for a test split, else predictions.tsv or .jsonl."""
    if split in task.test and task.files:
        return task.files[task.test.index(split)]
    if len(task.files) == 1:
        return task.files[0]
    return "predictions.tsv"


def content(
    task: Task, name: str, indices: Sequence[Any], predictions: Sequence[Any]
) -> str:
    """Content of a file of predictions.

    Args:
      task: the task.
      name: name of the file: .tsv is GLUE's form, .jsonl SuperGLUE's.
      indices: the rows' own numbers.
      predictions: names of classes, or numbers.

    >>> from train.config.tasks import TASKS
    >>> print(content(TASKS["boolq"], "BoolQ.jsonl", [7], ["True"]), end="")
    {"idx": 7, "label": "true"}
    """
    labels = [_answer(task, each) for each in predictions]
    if name.endswith(".tsv"):
        rows = zip(indices, labels, strict=True)
        return "index\tprediction\n" + "".join(f"{i}\t{label}\n" for i, label in rows)
    if task.form == "answer":
        lines = _passages(indices, labels)
    else:
        rows = zip(indices, labels, strict=True)
        lines = [{"idx": index, "label": label} for index, label in rows]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _answer(task: Task, prediction: Any) -> Any:
    if task.head == "regression":
        low, high = _RANGE if task.dataset is not None else (-np.inf, np.inf)
        return round(min(max(prediction, low), high), 4)
    if task.answers == "numbers":
        return task.labels.index(prediction)
    return prediction.lower() if task.answers == "lowercase" else prediction


def _passages(indices: Sequence[Any], labels: Sequence[Any]) -> list[dict[str, Any]]:
    """Nests the answers of MultiRC in questions, and questions in paragraphs."""
    paragraphs: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
    for index, label in zip(indices, labels, strict=True):
        if not isinstance(index, dict):  # without numbers of the benchmark
            index = {"paragraph": index, "question": 0, "answer": 0}
        questions = paragraphs.setdefault(index["paragraph"], {})
        answer = {"idx": index["answer"], "label": label}
        questions.setdefault(index["question"], []).append(answer)
    return [
        {
            "idx": paragraph,
            "passage": {
                "questions": [
                    {"idx": question, "answers": answers}
                    for question, answers in questions.items()
                ]
            },
        }
        for paragraph, questions in paragraphs.items()
    ]
