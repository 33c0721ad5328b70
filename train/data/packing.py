"""Packing of tokenized documents into batches, with grain.

Packed, the documents are joined, each with its end-of-text token, and cut into rows
that overlap by one token: the target of a row's last input is the first input of the
next one, so that every token but the very first is predicted exactly once. Padded,
each document is a row of its own, cut or padded to length.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np

from train.config.data_config import DataConfig
from train.data.encoding import Documents, Numbers

# Batches read ahead, so that a window of documents is read while devices compute.
PREFETCH_BATCHES = 16
_MOST_ROWS = 2**62

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens, by index, for grain."""

    tokens: Numbers  # all documents, one after the other
    starts: np.ndarray | range  # (rows,)
    stops: np.ndarray | range  # (rows,)

    @classmethod
    def cut(cls, documents: Documents, config: DataConfig) -> "Rows":
        """Cuts documents of tokens into rows; the last packed one may be shorter."""
        tokens, length = documents.tokens, config.sequence_length_tokens
        if config.packing == "packed":
            starts = np.arange(0, len(tokens), length)
            ends = len(tokens)
        else:
            ends = documents.ends[:].astype(np.int64)
            starts = np.append(0, ends)[:-1]
        stops = np.minimum(starts + length + 1, ends)
        some = stops - starts > 1  # one token alone has no target
        if not some.all():
            starts, stops = starts[some], stops[some]
        return cls(tokens, starts, stops)

    @property
    def predicted(self) -> np.ndarray:
        """Number of tokens that each row predicts."""
        return np.subtract(self.stops, self.starts) - 1

    @property
    def token_count(self) -> int:
        """Number of tokens in the rows; a token shared by two rows counts once."""
        if isinstance(self.starts, range):  # without gaps
            return self.stops[-1] if len(self) else 0
        ends = np.minimum(self.stops, np.append(self.starts[1:], self.stops[-1:]))
        return int(np.sum(ends - self.starts))

    def first(self, count: int) -> "Rows":
        """The first rows."""
        return Rows(self.tokens, self.starts[:count], self.stops[:count])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.stops[index]]


def all_rows(documents: Documents, config: DataConfig) -> Rows:
    """Rows to train on; a last packed row that is not full is dropped."""
    if config.packing == "padded":
        return Rows.cut(documents, config)
    # Ranges, as arrays of all starts and stops may be large.
    length = config.sequence_length_tokens
    stop = max(len(documents.tokens) - 1, 0) // length * length + 1
    starts, stops = range(0, stop - 1, length), range(length + 1, stop + 1, length)
    return Rows(documents.tokens, starts, stops)


def first_rows(documents: Documents, config: DataConfig) -> Rows:
    """Rows of as many full batches as `eval_tokens` allows, at least one batch."""
    size = config.batch_size_sequences
    rows = Rows.cut(documents, config)
    batch_ends = np.append(np.arange(size, len(rows), size), len(rows))
    predicted = np.append(0, np.cumsum(rows.predicted))[batch_ends]
    batches = np.count_nonzero(predicted <= config.eval_tokens)
    return rows.first(max(1, batches) * size)


def enough_to_evaluate(
    documents: Iterable[np.ndarray], config: DataConfig
) -> Iterator[np.ndarray]:
    """Yields documents until `first_rows` has enough."""
    length = config.sequence_length_tokens
    enough = max(config.eval_tokens, config.batch_size_tokens)
    packed = config.packing == "packed"
    predicted = -1 if packed else 0  # the very first token is never predicted
    for tokens in documents:
        yield tokens
        predicted += len(tokens) if packed else min(len(tokens) - 1, length)
        if predicted > enough:
            return


def make_batch(rows: Sequence[np.ndarray], part: slice, length: int) -> Batch:
    """Batch of this process: padded to the same shape in all processes."""
    tokens = np.zeros((part.stop - part.start, length + 1), np.int32)
    mask = np.zeros((part.stop - part.start, length), bool)
    for i, row in enumerate(rows[part]):
        tokens[i, : len(row)] = row
        mask[i, : len(row) - 1] = True
    return {
        "inputs": np.ascontiguousarray(tokens[:, :-1]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "mask": mask,
    }


def shuffled_batches(
    rows: Rows, config: DataConfig, seed: int, part: slice
) -> grain.IterDataset[Batch]:
    """Endless batches of all rows, reshuffled in each epoch."""
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle()
    # Many epochs and not infinitely many: grain overflows with batches of 1.
    dataset = dataset.repeat(_MOST_ROWS // max(len(rows), 1))
    return _batches(dataset, config, part)


def ordered_batches(
    rows: Rows, config: DataConfig, part: slice
) -> grain.IterDataset[Batch]:
    """Batches of all rows once, in order; the last is padded."""
    return _batches(grain.MapDataset.source(rows), config, part)


def _batches(
    rows: grain.MapDataset[np.ndarray], config: DataConfig, part: slice
) -> grain.IterDataset[Batch]:
    batch = functools.partial(
        make_batch, part=part, length=config.sequence_length_tokens
    )
    batches = rows.batch(config.batch_size_sequences, batch_fn=batch)
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)
    )
