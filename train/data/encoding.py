"""Documents as tokens: encoded in groups, marked at their ends, and joined."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from train.data.pieces import Piece
from train.tokenization.tokenizer import Tokenizer

# Characters encoded at once: enough for many cores, and small in memory.
ENCODED_CHARACTERS = 2**21


def encode_pieces(
    tokenizer: Tokenizer, pieces: Iterable[Piece]
) -> Iterator[tuple[np.ndarray, bool]]:
    """Encodes pieces: tokens in the smallest integer type, and whether a document ends.

    Adds the tokens that mark the start and end of a document. A document whose last
    piece is missing gets no end-of-text.
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
    """Encodes documents; see `encode_pieces`."""
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
    """An array in memory or in a file, read by slices."""

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
        """Collects documents in memory."""
        arrays = list(documents)
        sizes = np.array([len(array) for array in arrays], np.int64)
        return cls(np.concatenate([np.empty(0, np.uint16), *arrays]), np.cumsum(sizes))
