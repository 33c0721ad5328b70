"""Batches of streamed documents, tokenized and packed ahead of their use.

Packing is our own: rows overlap by one token, so that every token is predicted exactly
once. grain's own packing cuts rows without overlap, and the first token of each row
would never be predicted.
"""

import collections
import functools
import itertools
from typing import Any

import grain
import numpy as np

from train.config.data_config import DataConfig
from train.data.encoding import encode
from train.data.packing import PREFETCH_BATCHES, Batch, make_batch
from train.data.pieces import split_documents
from train.tokenization.tokenizer import Tokenizer

# Documents encoded at once: enough for many cores, and small in memory.
ENCODED_DOCUMENTS = 64


def streamed_batches(
    documents: grain.IterDataset[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    part: slice,
) -> grain.IterDataset[Batch]:
    """Batches of streamed documents, tokenized ahead of their use in a thread."""
    length, share = config.sequence_length_tokens, part.stop - part.start
    encoded = grain.experimental.FlatMapIterDataset(
        documents.batch(ENCODED_DOCUMENTS, batch_fn=list), _EncodeDocuments(tokenizer)
    )
    if config.packing == "packed":
        rows = PackedRows(encoded, length)
    else:
        rows = encoded.filter(lambda tokens: len(tokens) > 1)
        rows = rows.map(lambda tokens: tokens[: length + 1])
    batch = functools.partial(make_batch, part=slice(0, share), length=length)
    return grain.experimental.ThreadPrefetchIterDataset(
        rows.batch(share, batch_fn=batch), prefetch_buffer_size=PREFETCH_BATCHES
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
    """Holds documents that still have unused tokens.

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
        # The last token is kept: it is the first input of the next row.
        self._used += self._length
        while self._used >= len(self._waiting[0][1]):
            self._used -= len(self._waiting.popleft()[1])
        return np.concatenate(row)
