"""Batches of similar lengths: every row once per epoch, resumed exactly."""

import numpy as np
import pytest

from train.finetuning import batches, encoded
from train.tokenization.pairs import Encoded

BUCKETS = batches.bucket_lengths(16, 3)


def make_split(sizes, candidates=1):
    sizes = list(sizes)
    inputs = [
        Encoded([10 + i] * size, [0] * size, False) for i, size in enumerate(sizes)
    ]
    rows = len(sizes) // candidates
    labels = np.arange(rows, dtype=np.int32)
    return encoded.gather("train", inputs, candidates, labels, list(range(rows)), None)


@pytest.fixture
def split():
    return make_split(np.random.default_rng(0).integers(1, 17, 103))


def padding(split, size=4, part=None):
    return batches.Padding(split, BUCKETS, 9, size, part or slice(0, size))


def taken(iterator, count):
    found = [next(iterator) for _ in range(count)]
    return [np.sort(batch["labels"][batch["mask"]]) for batch in found], found


def test_each_epoch_has_every_row_once_in_another_order(split):
    per_epoch = 26
    iterator = batches.shuffled_batches(padding(split), seed=3)
    first, found = taken(iterator, per_epoch)
    second, _ = taken(iterator, per_epoch)
    assert batches.epochs(iterator.get_state(), per_epoch) == 2
    iterator.close()
    for epoch in (first, second):
        assert sorted(np.concatenate(epoch)) == list(range(103))
    assert [list(x) for x in first] != [list(x) for x in second]
    # The last row of 103 has a batch with three rows that do not count.
    assert sorted(int(batch["mask"].sum()) for batch in found)[:2] == [3, 4]
    lengths = {batch["tokens"].shape for batch in found}
    assert lengths <= {(4, length) for length in BUCKETS}
    assert len(lengths) == 3


def test_the_order_continues_from_a_saved_state_and_depends_on_the_seed(split):
    iterator = batches.shuffled_batches(padding(split), seed=3)
    taken(iterator, 20)
    state = iterator.get_state()
    expected, _ = taken(iterator, 30)
    iterator.close()
    again = batches.shuffled_batches(padding(split), seed=3)
    again.set_state(state)
    found, _ = taken(again, 30)
    again.close()
    for here, there in zip(found, expected, strict=True):
        np.testing.assert_array_equal(here, there)
    other = batches.shuffled_batches(padding(split), seed=4)
    assert [list(x) for x in taken(other, 26)[0]] != [list(x) for x in expected[6:]]
    other.close()


def test_rows_are_padded_on_the_right_and_missing_ones_do_not_count():
    batch = padding(make_split([3, 5]))(np.array([1, 0]))
    assert batch["tokens"].tolist() == [
        [11] * 5 + [9] * 3,
        [10] * 3 + [9] * 5,
        *[[9] * 8] * 2,
    ]
    assert batch["lengths"].tolist() == [5, 3, 0, 0]
    assert batch["labels"].tolist() == [1, 0, 0, 0]
    assert batch["mask"].tolist() == [True, True, False, False]
    part = padding(make_split([3, 5]), part=slice(1, 3))(np.array([1, 0]))
    assert part["lengths"].tolist() == [3, 0]


def test_candidates_have_an_axis_of_their_own():
    batch = padding(make_split([3, 5, 2, 1], candidates=2), size=2)(np.array([0, 1]))
    assert batch["tokens"].shape == (2, 2, 8)
    assert batch["lengths"].tolist() == [[3, 5], [2, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_evaluations_read_all_rows_once_by_length(split):
    found = list(batches.ordered_batches(padding(split, 8)))
    rows = np.concatenate([rows for rows, _ in found])
    assert sorted(rows) == list(range(103))
    assert (np.diff(split.lengths[rows]) >= 0).all()
    for rows, batch in found:
        np.testing.assert_array_equal(batch["labels"][batch["mask"]], rows)


def test_padding_is_half_of_that_to_one_length(split):
    fixed = 26 * 4 * 16 / len(split.tokens)
    assert 1 <= batches.padded_share(padding(split), 0) < 0.8 * fixed
