"""Documents as tokens: encoded in groups, marked at their ends, and joined."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from train.data.pieces import Piece
from train.tokenization.tokenizer import Tokenizer

# Encoded at once: enough to occupy many cores, little enough to hold in memory.
ENCODED_CHARACTERS = 2**21


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
