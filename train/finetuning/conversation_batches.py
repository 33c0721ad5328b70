"""Batches of conversations: padded to one of a few lengths, or packed into rows."""

from collections.abc import Sequence

import numpy as np

from train.config.sft_config import ConversationConfig
from train.conversations.encoded import Conversations
from train.finetuning.batches import Batch, MakeBatch, bucket_lengths

# Rows that may still take a conversation; more would fill them hardly better.
_OPEN_ROWS = 1000


def first_fit(lengths: np.ndarray, most: int) -> list[list[int]]:
    """Puts each item into the first of the newest rows that has room for it.

    Args:
      lengths: of the items, at most `most`.
      most: what a row takes.

    Returns:
      Items of each row.

    >>> first_fit(np.array([3, 4, 2, 1]), 5)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    free = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        first = max(0, len(rows) - _OPEN_ROWS)
        fits = free[first : len(rows)] >= length
        row = first + int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = most
        rows[row].append(item)
        free[row] -= length
    return rows


class ConversationBatches(MakeBatch):
    """Puts conversations into arrays of fixed shapes.

    Args:
      split: the conversations.
      rows: conversations of each row.
      buckets: lengths of rows, ascending.
      size: rows of a batch; missing ones have no tokens.
      part: rows of each batch for this process.
      has_segments: whether rows have several conversations.
    """

    def __init__(
        self,
        split: Conversations,
        rows: Sequence[Sequence[int]],
        buckets: tuple[int, ...],
        size: int,
        part: slice,
        *,
        has_segments: bool,
    ):
        self.size = size
        self._split, self._rows, self._buckets, self._part = split, rows, buckets, part
        self._has_segments = has_segments
        sizes = split.lengths
        self.lengths = np.array([sizes[list(row)].sum() for row in rows], np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self, rows: np.ndarray) -> Batch:
        """Makes a batch of at most `size` rows.

        Shapes: `inputs` and `targets` (int32), `mask` (bool, of targets that count)
        and, with segments, `positions` and `segments` (int32) are (rows, length);
        `tokens` (int32), the number of inputs, is (rows,).
        """
        longest = self.lengths[rows].max(initial=1)
        shape = self.size, next(each for each in self._buckets if each >= longest)
        names = ("inputs", "targets", "positions", "segments")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch |= {"mask": np.zeros(shape, bool)}
        batch |= {"tokens": np.zeros(self.size, np.int32)}
        for place, row in enumerate(rows):
            start = 0
            for segment, index in enumerate(self._rows[row], 1):
                own = self._split.place(index)
                tokens = self._split.tokens[own]
                to = place, slice(start, start + len(tokens) - 1)
                batch["inputs"][to], batch["targets"][to] = tokens[:-1], tokens[1:]
                batch["mask"][to] = self._split.counted[own][1:]
                batch["positions"][to] = np.arange(len(tokens) - 1)
                batch["segments"][to] = segment
                start += len(tokens) - 1
            batch["tokens"][place] = start
        if not self._has_segments:
            del batch["positions"], batch["segments"]
        return {name: array[self._part] for name, array in batch.items()}


def training_batches(
    data: ConversationConfig, split: Conversations, seed: int, part: slice
) -> ConversationBatches:
    """Batches to train on, packed or padded.

    Args:
      data: the settings.
      split: the conversations.
      seed: decides which conversations share a row.
      part: rows of each batch for this process.
    """
    if data.packing == "padded":
        return padded_batches(data, split, part)
    order = np.random.default_rng(seed).permutation(len(split))
    length = data.sequence_length_tokens
    rows = first_fit(split.lengths[order], length)
    rows = [[int(order[item]) for item in row] for row in rows]
    size = data.batch_size_sequences
    return ConversationBatches(split, rows, (length,), size, part, has_segments=True)


def padded_batches(
    data: ConversationConfig, split: Conversations, part: slice
) -> ConversationBatches:
    """Batches with one conversation a row, padded to one of a few lengths."""
    buckets = bucket_lengths(data.sequence_length_tokens, data.length_buckets)
    rows = [[index] for index in range(len(split))]
    size = data.batch_size_sequences
    return ConversationBatches(split, rows, buckets, size, part, has_segments=False)
