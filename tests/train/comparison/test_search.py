"""The best of made-up tries, and the seconds that count."""

import pytest

from tests.train.comparison.test_comparison_report import STEPS, entry, record, tries
from train import compare
from train.comparison.outcomes import Entry, choose
from train.comparison.search import Search
from train.comparison.trial_records import Trial


def test_a_try_that_lacks_seeds_is_not_the_best():
    found = tries("adamw", [(3.0, 3.0), (2.0,)])
    assert choose(found) == found[0]


def results(first, later=(), rate=0.1):
    """Results of adamw at two rates, with later losses at one of them."""
    argv = ["--optimizers", "adamw", "--learning-rates", "0.1", "0.2", "--seeds"]
    argv += [*map(str, range(1 + len(later))), "--tuning-seeds", "1"]
    search = Search(compare.read([*argv, "--matrix-scales", "1"]))
    finished = {}
    for trial in search.trials:
        loss = first[trial.optimizer.learning_rate]
        finished[trial] = record(trial.optimizer, trial.seed, [9.0, loss])
    (optimizer,) = (
        t.optimizer for t in search.trials if t.optimizer.learning_rate == rate
    )
    more = [Trial(optimizer, seed) for seed in range(1, 1 + len(later))]
    finished |= {
        t: record(t.optimizer, t.seed, [9.0, loss])
        for t, loss in zip(more, later, strict=True)
    }
    (found,) = search.entries(search.counted(finished)).values()
    return found


def test_later_seeds_count_but_do_not_choose():
    found = results({0.1: 2.0, 0.2: 3.0}, [8.0, None])
    assert [each.losses for each in found.tries] == [[2.0], [3.0]]
    assert found.best.learning_rate == 0.1
    assert found.best.losses == [2.0, 8.0, None]
    assert found.best.text == "diverged (1 of 3)"


def test_later_seeds_at_other_rates_do_not_count():
    assert results({0.1: 2.0, 0.2: 3.0}, [1.0], rate=0.2).best.losses == [2.0]


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
    slow = tries("subtrack", [(2.0,)], seconds=4.0)
    fast = tries("subtrack", [(3.0,)], seconds=0.5)
    (best,) = slow
    both = Entry.of("subtrack", slow + fast, best, STEPS)
    assert both.step_seconds == {"first": 5.0, "steady": 0.5, "moving": 3.0}
    assert both.seconds == 5 + 8 * 0.5 + 3
    # A later seed counts, too.
    later = Entry.of("subtrack", slow, [*best, *fast[0]], STEPS)
    assert later.step_seconds["steady"] == 0.5
