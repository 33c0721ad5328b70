"""Metrics of GLUE and SuperGLUE, by scikit-learn and SciPy."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics

from train.config.tasks import Task


class Outcome(NamedTuple):
    """Metrics of predictions.

    Attributes:
      values: metrics by name, the task's first one first.
      is_constant: whether all predictions are the same, which Matthews' and the
        correlations count as 0.
    """

    values: dict[str, float]
    is_constant: bool


def measure(
    task: Task,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    groups: Sequence[Any] | None = None,
) -> Outcome:
    """Metrics of a task.

    Args:
      task: the task.
      targets: names of the true classes, or numbers.
      predictions: predicted ones.
      groups: group of each row, from `examples.groups`.
    """
    truth, found = np.asarray(targets), np.asarray(predictions)
    is_constant = len(set(found.tolist())) < 2
    values = {
        name: _measure_one(name, task, truth, found, groups, is_constant)
        for name in task.metrics
    }
    return Outcome(values, is_constant)


def _measure_one(
    name: str,
    task: Task,
    truth: np.ndarray,
    found: np.ndarray,
    groups: Sequence[Any] | None,
    is_constant: bool,
) -> float:
    if name == "accuracy":
        return float(metrics.accuracy_score(truth, found))
    if name == "f1":  # of the second class: equivalent, duplicate, True
        is_true, is_found = truth == task.labels[1], found == task.labels[1]
        return float(metrics.f1_score(is_true, is_found, zero_division=0))
    if name == "macro_f1":
        return float(metrics.f1_score(truth, found, average="macro", zero_division=0))
    # Correlations with a constant are undefined.
    has_one_value = is_constant or len(set(truth.tolist())) < 2
    if name in ("matthews", "pearson", "spearman") and has_one_value:
        return 0.0
    if name == "matthews":
        return float(metrics.matthews_corrcoef(truth, found))
    if name in ("pearson", "spearman"):
        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        return float(correlate(truth, found).statistic)
    if name == "exact_match":  # all answers of a question are right
        return float(np.mean(_all_of_group(truth == found, groups)))
    assert name == "gender_parity", name
    return float(np.mean([len(set(each)) == 1 for each in _grouped(found, groups)]))


def _grouped(values: np.ndarray, groups: Sequence[Any] | None) -> list[list[Any]]:
    found = collections.defaultdict(list)
    keys = range(len(values)) if groups is None else groups
    for key, value in zip(keys, values.tolist(), strict=True):
        found[key].append(value)
    return list(found.values())


def _all_of_group(values: np.ndarray, groups: Sequence[Any] | None) -> list[bool]:
    return [all(each) for each in _grouped(values, groups)]


def majority(task: Task, training: Sequence[Any], targets: Sequence[Any]) -> float:
    """The task's first metric of one prediction for all rows.

    Args:
      task: the task.
      training: labels of the training rows; their most frequent class, or their mean,
        is predicted.
      targets: labels of the rows to predict.
    """
    if task.head == "regression":
        constant = float(np.mean(training))
    else:
        constant = collections.Counter(training).most_common(1)[0][0]
    only_first = [constant] * len(targets)
    return next(iter(measure(task, targets, only_first).values.values()))
