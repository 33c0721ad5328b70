"""Tokenizer of an encoder: texts and pairs with special tokens and type ids."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train.system import files
from train.tokenization.backends import JsonBackend, open_json

# Texts encoded at once: enough for many cores, and small in memory.
ENCODED_TEXTS = 4096
# Files of a tokenizer; the first is required.
FILES = (
    JsonBackend.file_name,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

# A text, and the second one of a pair.
Texts = tuple[str, str | None]


class Encoded(NamedTuple):
    """Tokens of a text or a pair.

    Attributes:
      ids: token ids, with special tokens.
      types: type id of each token.
      is_truncated: whether tokens were left out.
    """

    ids: list[int]
    types: list[int]
    is_truncated: bool


class PairTokenizer:
    """Encodes texts and pairs as the tokenizer's own post-processor arranges them.

    Text is never encoded as a special token, even if it spells one.

    Args:
      directory: contains tokenizer.json.
      max_length_tokens: longer inputs are truncated, the longer text of a pair first.

    Raises:
      ValueError: the tokenizer adds no special tokens, or its file is damaged.
      OSError: there is no tokenizer.json, or it cannot be read.
    """

    def __init__(self, directory: pathlib.Path, max_length_tokens: int):
        self._directory = directory
        path = directory / JsonBackend.file_name
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} holds no {path.name}: write it with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        self._tokenizer = open_json(path)
        # Files of sentence encoders truncate and pad to their own lengths.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if not added:
            raise ValueError(
                f"{path} puts no special tokens around texts (its post_processor): an "
                "encoder reads the first one; use the tokenizer of the weights"
            )
        most = self._tokenizer.num_special_tokens_to_add(is_pair=True)
        if max_length_tokens < most + 2:
            raise ValueError(
                f"--max-length-tokens {max_length_tokens} leaves no room for text: a "
                f"pair has {most} special tokens"
            )
        self._tokenizer.enable_truncation(max_length_tokens, strategy="longest_first")

    def encode(self, inputs: Sequence[Texts]) -> Iterator[Encoded]:
        """Encodes texts and pairs in parallel."""
        for start in range(0, len(inputs), ENCODED_TEXTS):
            group = inputs[start : start + ENCODED_TEXTS]
            singles = [text if pair is None else (text, pair) for text, pair in group]
            for found in self._tokenizer.encode_batch(singles):
                yield Encoded(found.ids, found.type_ids, bool(found.overflowing))

    def save(self, directory: pathlib.Path) -> None:
        """Copies the tokenizer's files.

        Raises:
          OSError: a file cannot be read or written.
        """
        for path in self.files:
            if path.parent != directory:
                files.write_whole(directory / path.name, path.read_bytes())

    @property
    def files(self) -> list[pathlib.Path]:
        """The tokenizer's files."""
        paths = (self._directory / name for name in FILES)
        return [path for path in paths if path.is_file()]
