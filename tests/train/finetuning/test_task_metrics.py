"""Metrics against tables made by hand and formulas written out."""

import math

import numpy as np
import pytest

from train.config.tasks import TASKS
from train.finetuning.task_metrics import majority, measure

YES, NO = "acceptable", "unacceptable"


def test_matthews_is_that_of_its_table():
    # 6 true positives, 3 true negatives, 1 false positive, 2 false negatives.
    truth = [YES] * 6 + [NO] * 3 + [NO] + [YES] * 2
    found = [YES] * 6 + [NO] * 3 + [YES] + [NO] * 2
    expected = (6 * 3 - 1 * 2) / math.sqrt((6 + 1) * (6 + 2) * (3 + 1) * (3 + 2))
    values = measure(TASKS["cola"], truth, found).values
    assert values == {"matthews": pytest.approx(expected)}


def test_f1_is_of_the_second_class_and_comes_first():
    same, other = "equivalent", "not_equivalent"
    truth = [same] * 4 + [other] * 2
    found = [same] * 3 + [other] + [same] * 2
    values = measure(TASKS["mrpc"], truth, found).values
    assert list(values) == ["f1", "accuracy"]
    assert values == {"f1": pytest.approx(6 / 9), "accuracy": 0.5}


def test_macro_f1_is_the_mean_over_classes():
    truth, found = ["entailment", "neutral", "contradiction"], ["entailment"] * 3
    values = measure(TASKS["cb"], truth, found).values
    assert values["macro_f1"] == pytest.approx(0.5 / 3)


def test_correlations_are_of_values_and_of_ranks():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=50)
    found = np.exp(truth)
    values = measure(TASKS["stsb"], truth, found).values
    x, y = truth - truth.mean(), found - found.mean()
    assert values["pearson"] == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))
    assert values["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("task", "truth"), [("cola", [YES, NO, YES]), ("stsb", [1.0, 2.0, 3.0])]
)
def test_a_constant_prediction_counts_as_0_and_is_told(task, truth):
    outcome = measure(TASKS[task], truth, truth[:1] * 3)
    assert set(outcome.values.values()) == {0.0}
    assert outcome.is_constant
    assert not measure(TASKS[task], truth, truth).is_constant


def test_all_answers_of_a_question_must_be_right():
    truth = ["True", "False", "True", "False"]
    found = ["True", "False", "True", "True"]
    groups = [(0, 0), (0, 1), (0, 0), (0, 1)]
    values = measure(TASKS["multirc"], truth, found, groups).values
    assert values == {"f1": pytest.approx(0.8), "exact_match": 0.5}


def test_parity_is_of_pairs_with_the_same_prediction():
    yes, no = "entailment", "not_entailment"
    values = measure(TASKS["axg"], [yes] * 4, [yes, yes, no, yes], [0, 0, 1, 1]).values
    assert values == {"accuracy": 0.75, "gender_parity": 0.5}


def test_the_majority_is_that_of_the_training_rows():
    assert majority(TASKS["sst2"], ["a", "b", "b"], ["b", "a", "a", "a"]) == 0.25
    assert majority(TASKS["cola"], [YES, YES, NO], [YES, NO]) == 0
    assert majority(TASKS["stsb"], [1.0, 4.0], [2.0, 3.0]) == 0
