"""Tokenizer backends: Hugging Face's tokenizers library, and SentencePiece."""

# ruff: noqa: D102 (the methods are documented in Backend)

import abc
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.tokenization import post_processor


class Backend(abc.ABC):
    """Vocabulary, encoder and decoder of one tokenizer file.

    Attributes:
      file_name: name of the file in a saved tokenizer's directory.
      prepends_begin: whether the file itself puts `begin` before texts.
      vocabulary_size: number of token ids, from 0 on.
    """

    file_name: ClassVar[str]
    prepends_begin: ClassVar[bool]
    vocabulary_size: int

    @property
    @abc.abstractmethod
    def begin(self) -> int | None:
        """Id of the token that begins texts according to the file, or None."""

    @property
    @abc.abstractmethod
    def end(self) -> int | None:
        """Id of the token that ends texts according to the file, or None."""

    @abc.abstractmethod
    def add(self, tokens: Mapping[str, int]) -> None:
        """Adds special tokens with the given ids."""

    @abc.abstractmethod
    def mark_special(self, ids: Iterable[int]) -> None:
        """Prevents text from being encoded as these tokens."""

    @abc.abstractmethod
    def special_names(self) -> dict[str, int]:
        """Ids of all special tokens by name."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts in parallel."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; skips special tokens and ids without a token."""

    @abc.abstractmethod
    def find(self, name: str) -> int | None:
        """Id of a token, or None."""

    @abc.abstractmethod
    def name(self, index: int) -> str | None:
        """Token of an id, or None."""

    @abc.abstractmethod
    def write(self, path: pathlib.Path, begin: int | None) -> None:
        """Writes the file; programs that read it put `begin` before texts."""

    def settings(self) -> dict[str, Any]:
        """Entries of tokenizer_config.json that this backend adds."""
        return {}


class JsonBackend(Backend):
    """Backend of a tokenizer.json or an in-memory `tokenizers.Tokenizer`."""

    file_name = "tokenizer.json"
    prepends_begin = True
    end = None

    def __init__(self, source: pathlib.Path | tokenizers.Tokenizer):
        if isinstance(source, pathlib.Path):
            source = open_json(source)
        # Saved settings for inference on short texts do not apply to training.
        source.no_truncation()
        source.no_padding()
        source.encode_special_tokens = True
        self._tokenizer = source
        self.vocabulary_size = max(source.get_vocab().values()) + 1

    @classmethod
    def train(cls, pieces: Iterator[str], vocabulary_size: int, end: str) -> Backend:
        """Trains a byte-level BPE with one special token, `end`."""
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[end],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(pieces, trainer)
        return cls(tokenizer)

    @property
    def begin(self) -> int | None:
        return post_processor.first_added(self._tokenizer)

    def add(self, tokens: Mapping[str, int]) -> None:
        for name, index in sorted(tokens.items(), key=lambda item: item[1]):
            # The library can only append; ids further on stay without a token.
            if index == self._tokenizer.get_vocab_size():
                self._tokenizer.add_special_tokens([name])
                self.vocabulary_size = index + 1

    def mark_special(self, ids: Iterable[int]) -> None:
        added = self._tokenizer.get_added_tokens_decoder()
        for index in ids:
            if index not in added or not added[index].special:
                name = self._tokenizer.id_to_token(index)
                token = tokenizers.AddedToken(name, special=True)
                self._tokenizer.add_special_tokens([token])

    def special_names(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: index for index, token in added if token.special}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encode = self._tokenizer.encode_batch_fast
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def find(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def name(self, index: int) -> str | None:
        known = 0 <= index < self.vocabulary_size
        return self._tokenizer.id_to_token(index) if known else None

    def write(self, path: pathlib.Path, begin: int | None) -> None:
        entries = json.loads(self._tokenizer.to_str())
        token = None if begin is None else (self.name(begin), begin)
        entries["post_processor"] = post_processor.replaced(
            entries["post_processor"], token
        )
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


class SentencePieceBackend(Backend):
    """Backend of a SentencePiece model."""

    file_name = "tokenizer.model"
    prepends_begin = False

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
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
        self._added: dict[str, int] = {}
        self.vocabulary_size = self._processor.vocab_size()

    @property
    def begin(self) -> int | None:
        return _valid(self._processor.bos_id())

    @property
    def end(self) -> int | None:
        return _valid(self._processor.eos_id())

    def add(self, tokens: Mapping[str, int]) -> None:
        self._added |= tokens
        last = self._processor.vocab_size() - 1
        self.vocabulary_size = max([last, *self._added.values()]) + 1

    def mark_special(self, ids: Iterable[int]) -> None:
        """Does nothing: SentencePiece never encodes text as control tokens."""

    def special_names(self) -> dict[str, int]:
        processor = self._processor
        own = filter(processor.is_control, range(processor.vocab_size()))
        return {processor.id_to_piece(index): index for index in own} | self._added

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        known = [int(i) for i in ids if i < self._processor.vocab_size()]
        return self._processor.decode(known)

    def find(self, name: str) -> int | None:
        index = self._processor.piece_to_id(name)
        if index != self._processor.unk_id() or name == self.name(index):
            return index
        return self._added.get(name)

    def name(self, index: int) -> str | None:
        if 0 <= index < self._processor.vocab_size():
            return self._processor.id_to_piece(index)
        return next((name for name, i in self._added.items() if i == index), None)

    def write(self, path: pathlib.Path, begin: int | None) -> None:
        path.write_bytes(self._model)

    def settings(self) -> dict[str, Any]:
        added = {
            str(index): {"content": name, "special": True}
            for name, index in self._added.items()
        }
        return {"added_tokens_decoder": added} if added else {}


BACKENDS = (JsonBackend, SentencePieceBackend)


def find_backend(directory: pathlib.Path) -> type[Backend] | None:
    """Backend of the tokenizer file in a directory, or None if there is none."""
    return next((b for b in BACKENDS if (directory / b.file_name).is_file()), None)


def _valid(index: int) -> int | None:
    # SentencePiece returns -1 for a model trained without the token.
    return index if index >= 0 else None


def open_json(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Opens a tokenizer.json.

    Raises:
      ValueError: it is none, or without tokens.
      OSError: it cannot be read.
    """
    text = path.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    if not tokenizer.get_vocab_size():
        raise ValueError(f"{path} has no tokens: use a trained tokenizer")
    return tokenizer
