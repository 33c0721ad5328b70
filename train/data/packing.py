"""From documents to batches of token ids, on grain: tokenize, cut, shuffle, batch.

Packed, the documents are joined, each with its end-of-text token, and cut into rows
that overlap by one token: the target of a row's last input is the first input of the
next one, so that every token but the very first is predicted exactly once. Padded,
each document is a row of its own, cut or padded to length.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from train.config.run_config import DataConfig
from train.data.pieces import Piece, split_documents
from train.tokenization.tokenizer import Tokenizer

# Read ahead, so that a window of documents can be read while devices compute.
PREFETCH_BATCHES = 16
# Encoded at once: enough to occupy many cores, little enough to hold in memory.
ENCODED_CHARACTERS = 2**21
ENCODED_DOCUMENTS = 64

_MOST_ROWS = 2**62

Batch = dict[str, np.ndarray]


def encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[Piece]
) -> Iterator[tuple[np.ndarray, bool]]:
    """The tokens of each piece, in the smallest type, and whether a document ends.

    Documents are between the tokens that mark them. One that is cut off, so that its
    last piece is missing, has no end-of-text.
    """
    dtype = np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.uint32
    begins = True
    for group in _groups(pieces):
        encoded = tokenizer.encode_batch([text for text, _ in group])
        for (_, ends), ids in zip(group, encoded, strict=True):
            before = tokenizer.document_start if begins else []
            after = tokenizer.document_end if ends else []
            yield np.array([*before, *ids, *after], dtype), ends
            begins = ends


def encode(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Iterator[np.ndarray]:
    """The tokens of each document, see `encode_pieces`."""
    document = []
    for tokens, ends in encode_pieces(tokenizer, pieces):
        document.append(tokens)
        if ends:
            yield np.concatenate(document)
            document = []
    if document:
        yield np.concatenate(document)


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group, characters = [], 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[0])
        if characters >= ENCODED_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


class Numbers(Protocol):
    """An array, or one in a file, of which ranges can be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Documents(NamedTuple):
    """Documents of tokens, in memory or on disk.

    Attributes:
      tokens: (tokens,), those of all documents, one document after the other.
      ends: (documents,), where each of them ends.
    """

    tokens: Numbers
    ends: Numbers

    @classmethod
    def gather(cls, documents: Iterable[np.ndarray]) -> "Documents":
        """Documents that come one by one, in memory."""
        arrays = list(documents)
        sizes = np.array([len(array) for array in arrays], np.int64)
        return cls(np.concatenate([np.empty(0, np.uint16), *arrays]), np.cumsum(sizes))


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
        some = stops - starts > 1  # a single token predicts nothing
        if not some.all():
            starts, stops = starts[some], stops[some]
        return cls(tokens, starts, stops)

    @property
    def predicted(self) -> np.ndarray:
        """Number of tokens that each row predicts."""
        return np.subtract(self.stops, self.starts) - 1

    @property
    def token_count(self) -> int:
        """Number of tokens in the rows; one that two of them share counts once."""
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
    """All rows to train on: packed ones are full, what is left over is dropped."""
    if config.packing == "padded":
        return Rows.cut(documents, config)
    # There may be more rows than should be listed in memory.
    length = config.sequence_length_tokens
    stop = max(len(documents.tokens) - 1, 0) // length * length + 1
    starts, stops = range(0, stop - 1, length), range(length + 1, stop + 1, length)
    return Rows(documents.tokens, starts, stops)


def first_rows(documents: Documents, config: DataConfig) -> Rows:
    """Rows for as many whole batches as `eval_tokens` allows, but at least one."""
    size = config.batch_size_sequences
    rows = Rows.cut(documents, config)
    batch_ends = np.append(np.arange(size, len(rows), size), len(rows))
    predicted = np.append(0, np.cumsum(rows.predicted))[batch_ends]
    batches = np.count_nonzero(predicted <= config.eval_tokens)
    return rows.first(max(1, batches) * size)


def enough_to_evaluate(
    documents: Iterable[np.ndarray], config: DataConfig
) -> Iterator[np.ndarray]:
    """As many of the first documents as `first_rows` can use."""
    length = config.sequence_length_tokens
    enough = max(config.eval_tokens, config.batch_size_tokens)
    packed = config.packing == "packed"
    predicted = -1 if packed else 0  # nothing predicts the very first token
    for tokens in documents:
        yield tokens
        predicted += len(tokens) if packed else min(len(tokens) - 1, length)
        if predicted > enough:
            return


def _make_batch(rows: Sequence[np.ndarray], part: slice, length: int) -> Batch:
    """The rows of this process, padded to the same number and length everywhere."""
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
    """Batches of all rows without end, each epoch in an order of its own."""
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle()
    # Not without end, which grain rounds to more than it can count in batches of 1.
    dataset = dataset.repeat(_MOST_ROWS // max(len(rows), 1))
    return _batches(dataset, config, part)


def ordered_batches(
    rows: Rows, config: DataConfig, part: slice
) -> grain.IterDataset[Batch]:
    """Batches of all rows, once; the last one is padded."""
    return _batches(grain.MapDataset.source(rows), config, part)


def _batches(
    rows: grain.MapDataset[np.ndarray], config: DataConfig, part: slice
) -> grain.IterDataset[Batch]:
    make_batch = functools.partial(
        _make_batch, part=part, length=config.sequence_length_tokens
    )
    batches = rows.batch(config.batch_size_sequences, batch_fn=make_batch)
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)
    )


def streamed_batches(
    documents: grain.IterDataset[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    part: slice,
) -> grain.IterDataset[Batch]:
    """Batches of documents that stream by, tokenized in a thread ahead of their use."""
    length, share = config.sequence_length_tokens, part.stop - part.start
    encoded = grain.experimental.FlatMapIterDataset(
        documents.batch(ENCODED_DOCUMENTS, batch_fn=list), _EncodeDocuments(tokenizer)
    )
    if config.packing == "packed":
        rows = PackedRows(encoded, length)
    else:
        rows = encoded.filter(lambda tokens: len(tokens) > 1)
        rows = rows.map(lambda tokens: tokens[: length + 1])
    make_batch = functools.partial(_make_batch, part=slice(0, share), length=length)
    return grain.experimental.ThreadPrefetchIterDataset(
        rows.batch(share, batch_fn=make_batch), prefetch_buffer_size=PREFETCH_BATCHES
    )


class _EncodeDocuments(grain.experimental.FlatMapTransform):
    """Tokenizes many documents at once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def flat_map(self, element: list[str]) -> list[np.ndarray]:
        return list(encode(self._tokenizer, split_documents(element)))


class PackedRows(grain.IterDataset[np.ndarray]):
    """Joins documents of tokens and cuts rows that overlap by one token."""

    def __init__(self, documents: grain.IterDataset[np.ndarray], length: int):
        super().__init__(documents)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _PackedRowsIterator(iter(self._parent), self._length)


class _PackedRowsIterator(grain.DatasetIterator[np.ndarray]):
    """Keeps the documents that are not used up.

    The state is that of the parent before the first of them, and how many of its
    tokens are used up.
    """

    def __init__(self, documents: grain.DatasetIterator[np.ndarray], length: int):
        super().__init__(documents)
        self._length = length
        self._waiting: collections.deque[tuple[Any, np.ndarray]] = collections.deque()
        self._used = 0

    def get_state(self) -> dict[str, Any]:
        state = self._waiting[0][0] if self._waiting else self._parent.get_state()
        return {"documents": state, "used_tokens": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["documents"])
        self._waiting.clear()
        self._used = state["used_tokens"]

    def __next__(self) -> np.ndarray:
        row, missing, skipped = [], self._length + 1, self._used
        for index in itertools.count():
            if index == len(self._waiting):
                state = self._parent.get_state()
                self._waiting.append((state, next(self._parent)))
            tokens = self._waiting[index][1]
            row.append(tokens[skipped : skipped + missing])
            missing, skipped = missing - len(row[-1]), 0
            if not missing:
                break
        # The last token stays: it is the first input of the next row.
        self._used += self._length
        while self._used >= len(self._waiting[0][1]):
            self._used -= len(self._waiting.popleft()[1])
        return np.concatenate(row)
