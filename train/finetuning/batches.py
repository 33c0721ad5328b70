"""Batches of rows of similar length, padded to one of a few lengths, with grain."""

import functools
from collections.abc import Iterator
from typing import Any, Protocol

import grain
import numpy as np

from train.finetuning.encoded import Split

# Rows are sorted by length within this many batches.
WINDOW_BATCHES = 50
PREFETCH_BATCHES = 16
_MOST_BATCHES = 2**40

Batch = dict[str, np.ndarray]


def bucket_lengths(maximum: int, count: int) -> tuple[int, ...]:
    """Lengths to which batches are padded: the maximum, its half, and so on.

    >>> bucket_lengths(128, 5)
    (8, 16, 32, 64, 128)
    """
    return tuple(sorted({-(-maximum // 2**k) for k in range(count)}))


class Padding:
    """Puts rows into arrays of fixed shapes.

    Args:
      split: the rows.
      buckets: lengths, ascending.
      padding_id: token in the place of none.
      size: rows of a batch; missing ones have no tokens and do not count.
      part: rows of each batch for this process.
    """

    def __init__(
        self,
        split: Split,
        buckets: tuple[int, ...],
        padding_id: int,
        size: int,
        part: slice,
    ):
        self.split, self.size = split, size
        self._buckets, self._padding_id, self._part = buckets, padding_id, part
        self.lengths = split.lengths

    def __call__(self, rows: np.ndarray) -> Batch:
        """Makes a batch of at most `size` rows.

        Shapes: `tokens` and `token_types` (int32) are (rows, length) or, of several
        candidates, (rows, candidates, length); `lengths` (int32) has all axes but the
        last; `labels` (int32 or float32) and `mask` (bool, of rows that count) are
        (rows,).
        """
        split, candidates = self.split, self.split.candidates
        longest = self.lengths[rows].max(initial=1)
        length = next(each for each in self._buckets if each >= longest)
        shape = (self.size, candidates, length)
        tokens = np.full(shape, self._padding_id, np.int32)
        types = np.zeros(shape, np.int32)
        lengths = np.zeros(shape[:2], np.int32)
        labels = np.zeros(self.size, split.labels.dtype)
        for place, row in enumerate(rows):
            for candidate in range(candidates):
                own = split.input(row * candidates + candidate)
                count = own.stop - own.start
                tokens[place, candidate, :count] = split.tokens[own]
                types[place, candidate, :count] = split.types[own]
                lengths[place, candidate] = count
        labels[: len(rows)] = split.labels[rows]
        batch = {"tokens": tokens, "token_types": types, "lengths": lengths}
        if candidates == 1:
            batch = {name: array[:, 0] for name, array in batch.items()}
        batch |= {"labels": labels, "mask": np.arange(self.size) < len(rows)}
        return {name: array[self._part] for name, array in batch.items()}


class ShuffledRows:
    """Rows of successive batches, endless, in a new order for each epoch.

    Each epoch has every row once. Within windows of `WINDOW_BATCHES` batches the rows
    are sorted by length, so that those of a batch are of similar length, and the
    batches are shuffled.

    Args:
      lengths: (rows,), their tokens.
      size: rows of a batch; the last one of an epoch may have fewer.
      seed: decides the order.
    """

    def __init__(self, lengths: np.ndarray, size: int, seed: int):
        self._lengths, self._size, self._seed = lengths, size, seed
        self.batches_per_epoch = -(-len(lengths) // size)
        # Neighbouring batches are of one epoch; reading ahead may reach the next one.
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return _MOST_BATCHES // self.batches_per_epoch * self.batches_per_epoch

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(int(index), self.batches_per_epoch)
        return self._epoch(epoch)[place]

    def _shuffle(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._lengths))
        batches = []
        for window in _cut(order, WINDOW_BATCHES * self._size):
            by_length = window[np.argsort(self._lengths[window], kind="stable")]
            own = _cut(by_length, self._size)
            batches += [own[i] for i in random.permutation(len(own))]
        return batches


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class MakeBatch(Protocol):
    """Protocol of a function that makes a batch of rows.

    Attributes:
      lengths: (rows,), tokens of each.
      size: rows of a batch.
    """

    lengths: np.ndarray
    size: int

    def __call__(self, rows: np.ndarray) -> Batch:
        """Makes a batch of at most `size` rows."""


def shuffled_batches(padding: MakeBatch, seed: int) -> grain.DatasetIterator[Batch]:
    """Endless batches for training; `get_state` counts them in `next_index`."""
    rows = ShuffledRows(padding.lengths, padding.size, seed)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(grain.MapDataset.source(rows).map(padding).to_iter_dataset(options))


def epochs(state: dict[str, Any], batches_per_epoch: int) -> float:
    """Passes over the rows, from the state of `shuffled_batches`."""
    return state["next_index"] / batches_per_epoch


def ordered_batches(padding: MakeBatch) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of all rows once, by length, each with its rows."""
    order = np.argsort(padding.lengths, kind="stable")
    for rows in _cut(order, padding.size):
        yield rows, padding(rows)


def padded_share(padding: Padding, seed: int) -> float:
    """Tokens of the batches of one epoch, with padding, over those of the rows."""
    rows = ShuffledRows(padding.split.lengths, padding.size, seed)
    sizes = (padding(rows[i])["tokens"].size for i in range(rows.batches_per_epoch))
    return sum(sizes) / len(padding.split.tokens)
