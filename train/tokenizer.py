"""Tokenizers of two libraries, tokenizers and SentencePiece, behind one interface."""

import abc
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

import huggingface_hub
import tokenizers
from huggingface_hub import errors
from tokenizers import decoders, models, pre_tokenizers, trainers

from train import files

END_OF_TEXT = "<|endoftext|>"
# All bytes, so that any text can be written, and END_OF_TEXT.
SMALLEST_VOCABULARY = 257
# Learning from more text than this takes long and hardly changes the vocabulary.
TRAINING_TEXT_CHARACTERS = 100_000_000
# Longer texts are encoded in pieces: in parallel, and with bounded memory.
PIECE_CHARACTERS = 2**17

# Of a document, and whether the document ends there.
Piece = tuple[str, bool]

# Under these names the usual tokenizers have it, GPT's and LLaMA's first.
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "[SEP]",
)
_AFTER_NEWLINE = re.compile(r".*\S\n(?=\S)", re.DOTALL)
_BEFORE_SPACE = re.compile(r".*\S(?= \S)", re.DOTALL)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Tokenizer(abc.ABC):
    """Turns text into token ids and back.

    No text, whatever it spells, is encoded as a special token.

    Attributes:
      vocabulary_size: number of token ids, from 0 on.
      end_of_text: id of the token that ends a document.
    """

    vocabulary_size: int
    end_of_text: int
    _file_name: ClassVar[str]

    @classmethod
    def open(cls, name_or_path: str) -> "Tokenizer":
        """Opens a tokenizer file, a directory that holds one, or one of the hub.

        Raises:
          ValueError: the file is no tokenizer, or has no end-of-text token.
          OSError: there is no such file or repository, or it cannot be read.
        """
        path = pathlib.Path(name_or_path).expanduser()
        if path.is_dir():
            return cls.load(path)
        if not path.exists():
            path = _download(name_or_path)
        return _of_file(path)(path)

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Tokenizer":
        """Opens what `save` wrote; raises as `open`."""
        for kind in _KINDS:
            if (path := directory / kind._file_name).is_file():
                return kind(path)
        names = " nor ".join(kind._file_name for kind in _KINDS)
        raise FileNotFoundError(f"{directory} holds neither {names}")

    @classmethod
    def train(cls, pieces: Iterable[str], vocabulary_size: int) -> "Tokenizer":
        """Learns a byte-level BPE.

        Args:
          pieces: the text, of which TRAINING_TEXT_CHARACTERS are used.
          vocabulary_size: most tokens to learn; a small text may yield fewer.

        Raises:
          ValueError: the vocabulary is too small for the bytes.
        """
        if vocabulary_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--vocabulary-size must be at least {SMALLEST_VOCABULARY}, "
                f"got {vocabulary_size}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_first_characters(pieces), trainer)
        return _JsonTokenizer(tokenizer)

    def save(self, directory: pathlib.Path) -> None:
        """Writes the tokenizer's file, all of it or nothing."""
        with files.replacing(directory / self._file_name) as partial:
            self._write(partial)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token that begins or ends one."""
        return self.encode_batch([text])[0]

    def continue_text(self, text: str, ids: Iterable[int]) -> str:
        """A text and what ids add to it, with the space between, if there is one."""
        first = self.encode(text)
        return text + self.decode([*first, *ids])[len(self.decode(first)) :]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed in parallel."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids without a token are left out."""

    @abc.abstractmethod
    def _write(self, path: pathlib.Path) -> None: ...


class _JsonTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, from a tokenizer.json or in memory."""

    _file_name = "tokenizer.json"

    def __init__(self, source: pathlib.Path | tokenizers.Tokenizer):
        if isinstance(source, pathlib.Path):
            source = _open_json(source)
        # Settings of whoever saved it, meant for inference on short texts.
        source.no_truncation()
        source.no_padding()
        source.encode_special_tokens = True
        self._tokenizer = source
        self.vocabulary_size = max(source.get_vocab().values()) + 1
        self.end_of_text = _find_end_of_text(source.token_to_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encode = self._tokenizer.encode_batch_fast
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def _write(self, path: pathlib.Path) -> None:
        path.write_text(self._tokenizer.to_str(pretty=True))  # save hides OSErrors


class _SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    _file_name = "tokenizer.model"

    def __init__(self, path: pathlib.Path):
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError(
                f"--tokenizer {path} needs the package sentencepiece: "
                "pip install sentencepiece"
            ) from error
        self._model = path.read_bytes()
        if not self._model:
            raise ValueError(f"{path} is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=self._model
            )
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model: {error}") from error
        self.vocabulary_size = self._processor.vocab_size()
        self.end_of_text = self._processor.eos_id()
        if self.end_of_text < 0:  # the model was trained without one of that role
            self.end_of_text = _find_end_of_text(self._find_piece)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i < self.vocabulary_size]
        return self._processor.decode(known)

    def _write(self, path: pathlib.Path) -> None:
        path.write_bytes(self._model)

    def _find_piece(self, name: str) -> int | None:
        index = self._processor.piece_to_id(name)
        return None if index == self._processor.unk_id() else index


_KINDS = (_JsonTokenizer, _SentencePieceTokenizer)


def split_documents(documents: Iterable[str]) -> Iterator[Piece]:
    """Cuts long documents into pieces that can be encoded one by one.

    The cuts are where byte-level tokenizers cut anyway, if there is such a place: at
    a single newline or space. (Tokenizers that begin every text with a space, like
    LLaMA's, then have one at a cut.)

    Yields:
      a piece, and whether a document ends with it.
    """
    for text in documents:
        start = 0
        while (limit := start + PIECE_CHARACTERS) < len(text):
            cut = _AFTER_NEWLINE.match(text, start, limit) or _BEFORE_SPACE.match(
                text, start, limit
            )
            stop = cut.end() if cut else limit
            yield text[start:stop], False
            start = stop
        yield text[start:], True


def _first_characters(pieces: Iterable[str]) -> Iterator[str]:
    left = TRAINING_TEXT_CHARACTERS
    for piece in pieces:
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _of_file(path: pathlib.Path) -> Callable[[pathlib.Path], Tokenizer]:
    return _SentencePieceTokenizer if path.suffix == ".model" else _JsonTokenizer


def _open_json(path: pathlib.Path) -> tokenizers.Tokenizer:
    text = path.read_bytes()
    try:
        return tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{path} is no tokenizer.json: {error}") from error


def _find_end_of_text(find: Callable[[str], int | None]) -> int:
    for name in _END_OF_TEXT_NAMES:
        if (index := find(name)) is not None:
            return index
    raise ValueError(
        "the tokenizer has no token that ends a text; it must have one of "
        + ", ".join(_END_OF_TEXT_NAMES)
    )


def _download(name: str) -> pathlib.Path:
    """Fetches a tokenizer's file from the hub, or finds it in the hub's cache."""
    if not _HUB_NAME.fullmatch(name) or name.endswith((".json", ".model")):
        raise FileNotFoundError(
            f"--tokenizer {name}: no such file or directory; give a tokenizer.json, "
            "a SentencePiece .model or the name of a repository on the hub"
        )
    for kind in _KINDS:
        try:
            return pathlib.Path(huggingface_hub.hf_hub_download(name, kind._file_name))
        except errors.LocalEntryNotFoundError as error:
            raise OSError(
                f"--tokenizer {name}: no such file or directory, and the hub cannot be "
                "reached to look for a repository of that name"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except (OSError, errors.HFValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"--tokenizer {name}: {reason}") from error
    names = " nor ".join(kind._file_name for kind in _KINDS)
    raise FileNotFoundError(f"--tokenizer {name} holds neither {names}")
