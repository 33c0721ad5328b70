"""Text of local files as tokens: counted, divided, tokenized once and cached."""

import functools
import hashlib
import itertools
import operator
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import tokenizers
import tqdm

from train.data import encoding
from train.data.notes import Notes
from train.data.pieces import Piece
from train.data.sources import LocalText, fingerprint
from train.data.token_cache import TokenCache
from train.data.token_files import Parts, Tokens
from train.tokenization.tokenizer import Tokenizer

# Increased whenever the same files and tokenizer give other tokens.
CACHE_VERSION = 1
# Delay of the progress bar, so that short texts are read without one.
SILENT_SECONDS = 3


class Corpus:
    """Text of local files, whose last part may be held out."""

    def __init__(self, text: LocalText, held_out_fraction: float):
        self._text, self._held_out_fraction = text, held_out_fraction
        self._notes = Notes()

    def train_tokenizer(self, vocabulary_size: int, cache: TokenCache) -> Tokenizer:
        """Trains a tokenizer on the training text, or reads it from the cache.

        Raises:
          ValueError: the vocabulary is too small; and as `tokens`.
          OSError: as `tokens`.
        """
        identity = self._identity() | {
            "vocabulary_size": vocabulary_size,
            "tokenizers": tokenizers.__version__,
        }

        def train() -> Tokenizer:
            pieces = itertools.takewhile(lambda part: not part[0], self._divided())
            texts = (text for _, (text, _) in pieces)
            return Tokenizer.train(texts, vocabulary_size)

        return cache.tokenizer(identity, train)

    def tokens(
        self, tokenizer: Tokenizer, cache: TokenCache, *, progress: bool = True
    ) -> Tokens:
        """Returns all tokens, from the cache if possible.

        Args:
          tokenizer: makes them.
          cache: keeps them.
          progress: whether to show a bar if it takes long.

        Raises:
          ValueError: there is no text, or a file has some that is not usable.
          OSError: a file cannot be read, or changes while it is read.
        """
        identity = self._identity() | {"tokenizer": _identity_of_tokenizer(tokenizer)}
        build = functools.partial(self._build, tokenizer, progress)
        return cache.tokens(identity, build)

    def _build(self, tokenizer: Tokenizer, progress: bool, notes: list[str]) -> Parts:
        before = self._identity_of_files()
        with tqdm.tqdm(
            desc="tokenizing",
            total=self._characters,
            unit=" characters",
            unit_scale=True,
            leave=False,
            delay=SILENT_SECONDS,
            disable=not progress,
        ) as bar:

            def count(part: tuple[bool, Piece]) -> Piece:
                bar.update(len(part[1][0]))
                return part[1]

            parts = itertools.groupby(self._divided(), operator.itemgetter(0))
            for is_held_out, pieces in parts:
                encoded = encoding.encode_pieces(tokenizer, map(count, pieces))
                for tokens, ends in encoded:
                    yield is_held_out, tokens, ends
        if self._identity_of_files() != before:
            names = ", ".join(map(str, self._text.paths[:3]))
            raise OSError(f"a file changed while it was read, of {names}; start again")
        notes.extend(self._notes.lines())

    def _divided(self) -> Iterator[tuple[bool, Piece]]:
        """Yields pieces of the text, each with whether it is held out."""
        split = round(self._characters * (1 - self._held_out_fraction))
        for text, ends in self._text.pieces():
            if split > 0:
                yield False, (text[:split], ends and len(text) <= split)
            if split < len(text):
                yield True, (text[max(split, 0) :], ends)
            split -= len(text)

    @functools.cached_property
    def _characters(self) -> int:
        count = sum(len(text) for text, _ in self._text.pieces(self._notes))
        if not count:
            names = ", ".join(map(str, self._text.paths[:3]))
            notes = "".join(f"; {line}" for line in self._notes.lines())
            raise ValueError(f"no text in {names}{notes}")
        return count

    def _identity(self) -> dict[str, Any]:
        """Everything that determines the text, for the cache's key."""
        return {
            "version": CACHE_VERSION,
            "files": self._identity_of_files(),
            "text_field": self._text.text_field,
            "skip_bad": self._text.skip_bad,
            "held_out_fraction": self._held_out_fraction,
        }

    def _identity_of_files(self) -> list[Any]:
        files = zip(self._text.paths, fingerprint(self._text.paths), strict=True)
        return [[str(path.absolute()), *_times(path), found] for path, found in files]


def _times(path: pathlib.Path) -> tuple[int, int]:
    """Last change of a file, also by programs that reset its modification time."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns


def _identity_of_tokenizer(tokenizer: Tokenizer) -> list[Any]:
    """Hash of a tokenizer's files and of the tokens it puts around documents."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(pathlib.Path(directory))
        for path in sorted(pathlib.Path(directory).iterdir()):
            digest.update(path.read_bytes())
    return [digest.hexdigest(), tokenizer.document_start, tokenizer.document_end]
