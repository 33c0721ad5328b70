"""Tokenizers of two libraries, tokenizers and SentencePiece, behind one interface."""

import abc
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.system import files
from train.tokenization import added_tokens, hub, post_processor, special_tokens
from train.tokenization.special_tokens import SpecialTokens

END_OF_TEXT = "<|endoftext|>"
# All bytes, so that any text can be written, and END_OF_TEXT.
SMALLEST_VOCABULARY = 257
# Far more than any tokenizer has; the trainer takes memory for all of them at once.
LARGEST_VOCABULARY = 10_000_000
# Learning from more text than this takes long and hardly changes the vocabulary.
TRAINING_TEXT_CHARACTERS = 100_000_000


class Tokenizer(abc.ABC):
    """Turns text into token ids and back.

    No text, whatever it spells, is encoded as a special token.

    Attributes:
      vocabulary_size: number of token ids, from 0 on.
      special: ids of the tokens that end, begin and pad texts.
      begins_texts: whether `special.begin` is put before texts.
      ends_texts: whether `end_of_text` is put after documents.
    """

    vocabulary_size: int
    special: SpecialTokens
    begins_texts: bool = False
    ends_texts: bool = True
    _file_name: ClassVar[str]
    _kept: special_tokens.Kept

    @classmethod
    def open(
        cls, name_or_path: str, weights: pathlib.Path | None = None
    ) -> "Tokenizer":
        """Opens a tokenizer file, a directory that holds one, or one of the hub.

        Its special tokens are those that the files beside it name, see
        `special_tokens.read`; without such files, those of usual names.

        Args:
          name_or_path: the tokenizer.
          weights: directory of the model's weights, whose files name the special
            tokens of a tokenizer from elsewhere, unless it holds another tokenizer.

        Raises:
          ValueError: the file is no tokenizer, or has no end-of-text token, or the
            files beside it name tokens that it does not have.
          OSError: there is no such file or repository, or it cannot be read.
        """
        path = pathlib.Path(name_or_path).expanduser()
        if path.is_dir():
            return cls.load(path, weights)
        if not path.exists():
            choices = [kind._file_name for kind in _KINDS]
            path = hub.download_tokenizer(name_or_path, choices, special_tokens.BESIDE)
        kind = _SentencePieceTokenizer if path.suffix == ".model" else _JsonTokenizer
        beside = [path.parent] if path.name == kind._file_name else []
        return kind(path, beside + _without_tokenizer(weights))

    @classmethod
    def load(
        cls, directory: pathlib.Path, weights: pathlib.Path | None = None
    ) -> "Tokenizer":
        """Opens what `save` wrote; arguments and errors as those of `open`."""
        if kind := _kind_in(directory):
            path = directory / kind._file_name
            return kind(path, [directory, *_without_tokenizer(weights)])
        names = " nor ".join(kind._file_name for kind in _KINDS)
        raise FileNotFoundError(f"{directory} holds neither {names}")

    @classmethod
    def train(cls, pieces: Iterable[str], vocabulary_size: int) -> "Tokenizer":
        """Learns a byte-level BPE.

        Args:
          pieces: the text, of which TRAINING_TEXT_CHARACTERS are used.
          vocabulary_size: most tokens to learn; a small text may yield fewer.

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
        """Ids behind the text of a document."""
        return [self.end_of_text] if self.ends_texts else []

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end a text, or begin the next one."""
        return tuple(dict.fromkeys([*self.special.ends, *self.document_start]))

    def mark_documents(self, *, begin: bool, end: bool) -> None:
        """Decides which tokens stand before and behind the text of a document.

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
        """Writes the tokenizer's file and those that name its special tokens.

        transformers reads from them a tokenizer that gives the ids of training: with
        the beginning token if `begins_texts`, and no other special token.
        """
        tokens = self.special
        if not self.ends_texts:
            tokens = tokens._replace(ends=self.stops)
        settings = {
            "add_bos_token": self.begins_texts,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            **self._settings(),
        }
        special_tokens.save(directory, tokens, self.name, self._kept, settings)
        with files.replacing(directory / self._file_name) as partial:
            self._write(partial)

    def prompt(self, text: str) -> list[int]:
        """The ids of the beginning of a document, to be continued."""
        return [*self.document_start, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token that begins or ends one."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed in parallel."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids without a token are left out."""

    @abc.abstractmethod
    def find(self, name: str) -> int | None:
        """The id of a token."""

    @abc.abstractmethod
    def name(self, index: int) -> str | None:
        """The token of an id."""

    @abc.abstractmethod
    def _write(self, path: pathlib.Path) -> None: ...

    def _settings(self) -> dict[str, Any]:
        """Entries of tokenizer_config.json that a kind of tokenizer adds."""
        return {}


class _JsonTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, from a tokenizer.json or in memory."""

    _file_name = "tokenizer.json"

    def __init__(
        self,
        source: pathlib.Path | tokenizers.Tokenizer,
        directories: Sequence[pathlib.Path] = (),
    ):
        if isinstance(source, pathlib.Path):
            source = _open_json(source)
        # Settings of whoever saved it, meant for inference on short texts.
        source.no_truncation()
        source.no_padding()
        source.encode_special_tokens = True
        self._tokenizer = source
        self.vocabulary_size = max(source.get_vocab().values()) + 1
        self._add(added_tokens.read(directories, self))
        named = special_tokens.read(directories, self)
        first = post_processor.first_added(source)
        self.special = special_tokens.fill(named, self.find, begin=first)
        self._kept = special_tokens.read_kept(directories)
        adds = self._kept.adds_begin
        if adds is None:
            adds = first is not None and first == self.special.begin
        self.begins_texts = adds
        # Else text could spell them.
        added = source.get_added_tokens_decoder()
        for index in self.special.all:
            if index not in added or not added[index].special:
                name = source.id_to_token(index)
                source.add_special_tokens([tokenizers.AddedToken(name, special=True)])

    def _add(self, tokens: Mapping[str, int]) -> None:
        """Adds tokens that the tokenizer's file does not have, but follow on it."""
        for name, index in sorted(tokens.items(), key=lambda item: item[1]):
            if index == self._tokenizer.get_vocab_size():
                self._tokenizer.add_special_tokens([name])
                self.vocabulary_size = index + 1

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

    def _write(self, path: pathlib.Path) -> None:
        entries = json.loads(self._tokenizer.to_str())
        begin = next(((self.name(i), i) for i in self.document_start), None)
        entries["post_processor"] = post_processor.replaced(
            entries["post_processor"], begin
        )
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


class _SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    _file_name = "tokenizer.model"

    def __init__(self, path: pathlib.Path, directories: Sequence[pathlib.Path] = ()):
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
        self._added: dict[str, int] = {}
        self._added = added_tokens.read(directories, self)
        last = self._processor.vocab_size() - 1
        self.vocabulary_size = max([last, *self._added.values()]) + 1
        # Ids of a model that was trained without a token of a role are negative.
        end, begin = self._processor.eos_id(), self._processor.bos_id()
        self.special = special_tokens.fill(
            special_tokens.read(directories, self),
            self.find,
            end=end if end >= 0 else None,
            begin=begin if begin >= 0 else None,
        )
        self._kept = special_tokens.read_kept(directories)
        self.begins_texts = bool(self._kept.adds_begin)

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

    def _write(self, path: pathlib.Path) -> None:
        path.write_bytes(self._model)

    def _settings(self) -> dict[str, Any]:
        added = {
            str(index): {"content": name, "special": True}
            for name, index in self._added.items()
        }
        return {"added_tokens_decoder": added} if added else {}


_KINDS = (_JsonTokenizer, _SentencePieceTokenizer)


def _first_characters(pieces: Iterable[str]) -> Iterator[str]:
    left = TRAINING_TEXT_CHARACTERS
    for piece in pieces:
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _kind_in(directory: pathlib.Path) -> type[Tokenizer] | None:
    return next((k for k in _KINDS if (directory / k._file_name).is_file()), None)


def _without_tokenizer(weights: pathlib.Path | None) -> list[pathlib.Path]:
    """The directory, unless it holds a tokenizer that its files may speak of."""
    return [weights] if weights is not None and _kind_in(weights) is None else []


def _open_json(path: pathlib.Path) -> tokenizers.Tokenizer:
    text = path.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{path} is no tokenizer.json: {error}") from error
    if not tokenizer.get_vocab_size():
        raise ValueError(f"{path} has no tokens: give a trained tokenizer")
    return tokenizer
