"""The best of made-up tries, and the seconds that count."""

import dataclasses
import math

import pytest

from tests.train.test_comparison_report import SUBTRACK, entry, record


def with_later(found, *losses, rate=None):
    """The entry with records of seeds from 10 on, at its best rates or another."""
    optimizer = found.chosen.optimizer
    if rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    later = tuple(
        record(optimizer, seed, [9.0, loss]) for seed, loss in enumerate(losses, 10)
    )
    return dataclasses.replace(found, later=(*found.later, *later))


def test_a_try_that_lacks_seeds_is_not_the_best():
    started = entry("adamw", [(3.0, 3.0), (2.0,)])
    assert started.best.optimizer.learning_rate == 0.1


def test_later_seeds_count_but_do_not_choose():
    found = with_later(entry("adamw", [(2.0,), (3.0,)]), 8.0, None)
    assert found.chosen.losses == [2.0]
    assert found.best.learning_rate == 0.1
    assert found.best.losses == [2.0, 8.0, math.inf]
    assert found.best.text == "diverged (1 of 3)"


def test_later_seeds_at_other_rates_do_not_count():
    found = with_later(entry("adamw", [(2.0,), (3.0,)]), 1.0, rate=0.2)
    assert found.best.losses == [2.0]


@pytest.mark.parametrize(
    ("losses", "scales", "edges"),
    [
        ([2.0, 3.0, 4.0], [1.0], ("learning_rate",)),
        ([3.0, 2.0, 4.0], [1.0], ()),
        ([4.0, 3.0, 2.0], [1.0], ("learning_rate",)),
        ([4.0, 2.0, 3.0], [0.1, 0.2, 0.3], ()),
        ([2.0, 4.0, 3.0], [0.1, 0.2, 0.3], ("matrix_scale",)),
        ([2.0, 4.0, 3.0, 5.0], [0.1, 0.2], ("learning_rate", "matrix_scale")),
        ([2.0], [1.0], ()),
    ],
)
def test_the_best_may_be_at_the_edge_of_what_was_tried(losses, scales, edges):
    assert entry("subtrack", [(loss,) for loss in losses], scales).at_edge == edges


def test_seconds_are_those_of_the_trial_disturbed_least():
    slow, fast = (entry("subtrack", [(2.0,)], seconds=s).tries for s in (4.0, 0.5))
    both = dataclasses.replace(SUBTRACK, tries=slow + fast)
    assert both.step_seconds == {"first": 5.0, "steady": 0.5, "moving": 3.0}
    assert both.seconds(10) == 5 + 8 * 0.5 + 3
    slow_alone = dataclasses.replace(SUBTRACK, tries=slow)
    assert with_later(slow_alone, 3.0).step_seconds["steady"] == 1.0
