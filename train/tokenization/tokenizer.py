"""Tokenizer: opening, training and saving, encoding with special tokens."""

import pathlib
from collections.abc import Iterable, Iterator, Sequence

from train.system import files
from train.tokenization import added_tokens, hub, special_tokens
from train.tokenization.backends import (
    BACKENDS,
    Backend,
    JsonBackend,
    SentencePieceBackend,
    find_backend,
)

END_OF_TEXT = "<|endoftext|>"
# All bytes, so that any text can be encoded, and END_OF_TEXT.
SMALLEST_VOCABULARY = 257
# The trainer allocates memory for this many tokens; real tokenizers have far fewer.
LARGEST_VOCABULARY = 10_000_000
# More training text takes long and hardly changes the vocabulary.
TRAINING_TEXT_CHARACTERS = 100_000_000


class Tokenizer:
    """Encodes text as token ids and decodes them.

    Text is never encoded as a special token, even if it spells one.

    Args:
      backend: the tokenizer's file.
      directories: contain files that name special tokens, see `special_tokens.read`.

    Attributes:
      special: ids of the tokens that end, begin and pad texts.
      begins_texts: whether `special.begin` is put before texts.
      ends_texts: whether `end_of_text` is put after documents.
    """

    def __init__(self, backend: Backend, directories: Sequence[pathlib.Path] = ()):
        backend.add(added_tokens.read(directories, backend))
        self._backend = backend
        named = special_tokens.read(directories, backend)
        begin = backend.begin
        self.special = special_tokens.fill(
            named, backend.find, begin=begin, end=backend.end
        )
        self._kept = special_tokens.read_kept(directories)
        self.begins_texts = self._kept.adds_begin
        if self.begins_texts is None:
            is_own = begin is not None and begin == self.special.begin
            self.begins_texts = backend.prepends_begin and is_own
        self.ends_texts = True
        backend.mark_special(self.special.all)

    @classmethod
    def open(
        cls, name_or_path: str, weights: pathlib.Path | None = None
    ) -> "Tokenizer":
        """Opens a tokenizer from a file, a directory, or a repository of the hub.

        Files beside the tokenizer's file name its special tokens, see
        `special_tokens.read`; without them, common names are tried.

        Args:
          name_or_path: the tokenizer.
          weights: directory of the model's weights. Unless it contains a tokenizer,
            its files name the special tokens, too.

        Raises:
          ValueError: the file is not a tokenizer or has no end-of-text token, or a
            file beside it names an unknown token.
          OSError: there is no such file or repository, or it cannot be read.
        """
        path = pathlib.Path(name_or_path).expanduser()
        if path.is_dir():
            return cls.load(path, weights)
        if not path.exists():
            choices = [each.file_name for each in BACKENDS]
            path = hub.download_tokenizer(name_or_path, choices, special_tokens.BESIDE)
        backend = SentencePieceBackend if path.suffix == ".model" else JsonBackend
        beside = [path.parent] if path.name == backend.file_name else []
        return cls(backend(path), beside + _without_tokenizer(weights))

    @classmethod
    def load(
        cls, directory: pathlib.Path, weights: pathlib.Path | None = None
    ) -> "Tokenizer":
        """Loads a tokenizer that `save` wrote; arguments and errors: see `open`."""
        if backend := find_backend(directory):
            source = backend(directory / backend.file_name)
            return cls(source, [directory, *_without_tokenizer(weights)])
        names = " nor ".join(each.file_name for each in BACKENDS)
        raise FileNotFoundError(f"{directory} holds neither {names}")

    @classmethod
    def train(cls, pieces: Iterable[str], vocabulary_size: int) -> "Tokenizer":
        """Trains a byte-level BPE.

        Args:
          pieces: the text, of which the first TRAINING_TEXT_CHARACTERS are used.
          vocabulary_size: maximum number of tokens; a small text may yield fewer.

        Raises:
          ValueError: the vocabulary is too small for the bytes, or too large.
        """
        if not SMALLEST_VOCABULARY <= vocabulary_size <= LARGEST_VOCABULARY:
            is_small = vocabulary_size < SMALLEST_VOCABULARY
            bound = SMALLEST_VOCABULARY if is_small else LARGEST_VOCABULARY
            raise ValueError(
                f"--vocabulary-size must be at {'least' if is_small else 'most'} "
                f"{bound}, got {vocabulary_size}"
            )
        pieces = _first_characters(pieces)
        return cls(JsonBackend.train(pieces, vocabulary_size, END_OF_TEXT))

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, from 0 on."""
        return self._backend.vocabulary_size

    @property
    def end_of_text(self) -> int:
        """Id of the token that ends a document."""
        return self.special.ends[0]

    @property
    def document_start(self) -> list[int]:
        """Ids before the text of a document."""
        begin = self.special.begin
        return [begin] if self.begins_texts and begin is not None else []

    @property
    def document_end(self) -> list[int]:
        """Ids after the text of a document."""
        return [self.end_of_text] if self.ends_texts else []

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that stop generation: they end a text or begin the next one."""
        return tuple(dict.fromkeys([*self.special.ends, *self.document_start]))

    @property
    def special_names(self) -> dict[str, int]:
        """Ids of all special tokens by name."""
        return self._backend.special_names()

    @property
    def chat_template(self) -> str | None:
        """Template of conversations in Jinja, None if there is none; `save` saves it.

        Raises:
          ValueError: it is not text.
        """
        given = self._kept.settings.get("chat_template")
        if isinstance(given, list):  # several by name
            named = [each for each in given if isinstance(each, dict)]
            given = {each.get("name"): each.get("template") for each in named}.get(
                "default"
            )
        if not isinstance(given, str | None):
            raise ValueError(
                f"{special_tokens.TOKENIZER_FILE}: chat_template={str(given)[:60]!r} "
                "must be a template in Jinja"
            )
        return given

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self._kept.settings["chat_template"] = source

    def mark_special(self, ids: Sequence[int]) -> None:
        """Prevents text from being encoded as these tokens."""
        self._backend.mark_special(ids)

    def mark_documents(self, *, begin: bool, end: bool) -> None:
        """Chooses which special tokens surround the text of a document.

        Raises:
          ValueError: there is no token that begins a text.
        """
        if begin and self.special.begin is None:
            raise ValueError(
                "the tokenizer has no token that begins a text (BOS): leave out --bos "
                f"and --bos-and-eos, or name it as bos_token in the tokenizer's own "
                f"{special_tokens.TOKENIZER_FILE}"
            )
        self.begins_texts, self.ends_texts = begin, end

    def save(self, directory: pathlib.Path) -> None:
        """Saves the tokenizer's file and the files that name its special tokens.

        transformers loads them as a tokenizer with the same ids as in training: with
        the begin token if `begins_texts`, and no other special token.
        """
        tokens = self.special
        if not self.ends_texts:
            tokens = tokens._replace(ends=self.stops)
        settings = {
            "add_bos_token": self.begins_texts,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **self._backend.settings(),
        }
        special_tokens.save(directory, tokens, self.name, self._kept, settings)
        with files.replacing(directory / self._backend.file_name) as partial:
            self._backend.write(partial, next(iter(self.document_start), None))

    def prompt(self, text: str) -> list[int]:
        """Encodes the start of a document for a model to continue."""
        return [*self.document_start, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Encodes a text, without begin and end tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts in parallel, without begin and end tokens."""
        return self._backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; skips special tokens and ids without a token."""
        return self._backend.decode(ids)

    def find(self, name: str) -> int | None:
        """Id of a token, or None."""
        return self._backend.find(name)

    def name(self, index: int) -> str | None:
        """Token of an id, or None."""
        return self._backend.name(index)


def _first_characters(pieces: Iterable[str]) -> Iterator[str]:
    left = TRAINING_TEXT_CHARACTERS
    for piece in pieces:
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _without_tokenizer(weights: pathlib.Path | None) -> list[pathlib.Path]:
    """The directory of the weights, unless its files may describe a tokenizer in it."""
    return [weights] if weights is not None and find_backend(weights) is None else []
