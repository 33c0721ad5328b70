"""Special tokens (end, begin, padding) in a model's files: read, complete, save."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from models import safetensors_files
from models.json_entries import shorten
from train.system import files

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
# In order of precedence.
FILES = (
    GENERATION_FILE,
    TOKENIZER_FILE,
    "special_tokens_map.json",
    "config.json",
)
# Common names, tried when no file names the token.
END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "[EOS]",
    "[SEP]",
)
BEGIN_NAMES = (
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    "<|startoftext|>",
    "[BOS]",
)
# Entries of tokenizer_config.json that a saved tokenizer retains.
_KEPT_SETTINGS = ("chat_template", "padding_side", "unk_token")
TEMPLATE_FILE = "chat_template.jinja"
ADDED_FILE = "added_tokens.json"
# All files that are read beside a tokenizer's own file.
BESIDE = (*FILES, TEMPLATE_FILE, ADDED_FILE)
# Classes that put BOS before texts unless add_bos_token is false.
_CLASSES_WITH_BEGIN = ("LlamaTokenizer", "LlamaTokenizerFast")
# transformers' id for a missing token.
_NO_ID = -1


class Vocabulary(Protocol):
    """Protocol of a vocabulary: lookup of tokens by name and by id."""

    vocabulary_size: int

    def find(self, name: str) -> int | None:
        """Id of a token, or None."""

    def name(self, index: int) -> str | None:
        """Token of an id, or None."""


class SpecialTokens(NamedTuple):
    """Ids of the special tokens: end, begin, padding.

    Attributes:
      ends: tokens that end a text; training uses the first; empty: unknown.
      begin: token that begins a text, or None.
      padding: token that fills a batch, or None.
    """

    ends: tuple[int, ...] = ()
    begin: int | None = None
    padding: int | None = None

    @property
    def all(self) -> tuple[int, ...]:
        """All special tokens without duplicates."""
        given = [*self.ends, self.begin, self.padding]
        return tuple(dict.fromkeys(i for i in given if i is not None))


def read(directories: Sequence[pathlib.Path], vocabulary: Vocabulary) -> SpecialTokens:
    """Reads the special tokens from Hugging Face's configuration files (`FILES`).

    The first file that names a token wins; all are validated. A token is named by an
    id or a list of ids (`eos_token_id`), or by its text, as a string or an object
    (`eos_token`).

    Args:
      directories: contain some of the files, in order of precedence.
      vocabulary: the tokenizer.

    Raises:
      ValueError: a file is damaged, or names a token that the vocabulary lacks.
      OSError: a file cannot be read.
    """
    sources = [
        (path, read_json(path))
        for directory in directories
        for file in FILES
        if (path := directory / file).is_file()
    ]

    def first(role: str) -> tuple[int, ...]:
        found = [
            parse(entries.get(key), key, path, vocabulary)
            for path, entries in sources
            for key, parse in ((f"{role}_token_id", _ids), (f"{role}_token", _named))
        ]
        return next(filter(None, found), ())

    def only(role: str) -> int | None:
        return next(iter(first(role)), None)

    return SpecialTokens(first("eos"), only("bos"), only("pad"))


def fill(
    tokens: SpecialTokens, find: Callable[[str], int | None], **found: int | None
) -> SpecialTokens:
    """Completes special tokens that no file names, from the vocabulary.

    If files name an end token but no begin token, common names are not tried for it.

    Args:
      tokens: from `read`.
      find: returns the id of a token.
      **found: ids of `end` and `begin` in the tokenizer's own file, or None.

    Raises:
      ValueError: there is no token that ends a text.
    """

    def first(role: str, names: Sequence[str]) -> int | None:
        if (index := found.get(role)) is not None:
            return index
        return next((i for i in map(find, names) if i is not None), None)

    if tokens.begin is None:
        names = () if tokens.ends else BEGIN_NAMES
        tokens = tokens._replace(begin=first("begin", names))
    if not tokens.ends:
        end = first("end", END_NAMES)
        if end is None:
            raise ValueError(
                "the tokenizer has no token that ends a text: name it as eos_token in "
                f"a {TOKENIZER_FILE} beside the tokenizer's file; common names are "
                f"{', '.join(END_NAMES)}"
            )
        tokens = tokens._replace(ends=(end,))
    return tokens


class Kept(NamedTuple):
    """Other entries of a model's files that a saved tokenizer retains."""

    settings: dict[str, Any]  # entries of tokenizer_config.json
    generation: dict[str, Any]  # entries of generation_config.json
    adds_begin: bool | None = None  # whether BOS is put before texts; None: not given


def read_kept(directories: Sequence[pathlib.Path]) -> Kept:
    """Reads the entries that `save` retains; arguments and errors: see `read`."""
    settings, generation, kept = {}, {}, {}
    for directory in reversed(directories):
        found = read_json(directory / TOKENIZER_FILE)
        settings |= found
        kept |= {name: found[name] for name in _KEPT_SETTINGS if name in found}
        generation |= read_json(directory / GENERATION_FILE)
        template = directory / TEMPLATE_FILE
        if template.is_file():
            kept["chat_template"] = _read_text(template)
    adds_begin = settings.get("add_bos_token")
    if not isinstance(adds_begin, bool | None):
        raise ValueError(
            f"{TOKENIZER_FILE} in {directories[0]}: "
            f"add_bos_token={shorten(adds_begin)} must be true or false"
        )
    has_fast = any((each / "tokenizer.json").exists() for each in directories)
    if adds_begin is None and not has_fast:
        adds_begin = settings.get("tokenizer_class") in _CLASSES_WITH_BEGIN
    return Kept(kept, generation, adds_begin)


def save(
    directory: pathlib.Path,
    tokens: SpecialTokens,
    name: Callable[[int], str | None],
    kept: Kept,
    settings: Mapping[str, Any],
) -> None:
    """Saves tokenizer_config.json and generation_config.json.

    Args:
      directory: an existing directory.
      tokens: the special tokens to name.
      name: returns the token of an id.
      kept: other entries of both files.
      settings: other entries of tokenizer_config.json, overriding `kept`.
    """
    roles = {"eos": tokens.ends[0], "bos": tokens.begin, "pad": tokens.padding}
    names = {f"{role}_token": name(i) for role, i in roles.items() if i is not None}
    for file, entries in (
        (TOKENIZER_FILE, kept.settings | settings | names),
        (GENERATION_FILE, kept.generation | ids(tokens)),
    ):
        files.write_whole(directory / file, json.dumps(entries, indent=2) + "\n")


def ids(tokens: SpecialTokens) -> dict[str, Any]:
    """Entries that name the tokens in generation_config.json and config.json."""
    ends = tokens.ends[0] if len(tokens.ends) == 1 else list(tokens.ends)
    roles = {"eos": ends, "bos": tokens.begin, "pad": tokens.padding}
    return {f"{role}_token_id": i for role, i in roles.items() if i is not None}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file; returns {} if the file does not exist.

    Raises:
      ValueError: the file does not contain a JSON object.
      OSError: the file cannot be read.
    """
    return safetensors_files.read_json(path) if path.is_file() else {}


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: download it again") from error


def _ids(
    value: Any, key: str, path: pathlib.Path, vocabulary: Vocabulary
) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None and i != _NO_ID]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(
                f"{path}: {key}={shorten(value)} must be the id of a token, or a list "
                "of ids"
            )
        if i < 0 or vocabulary.name(i) is None:
            raise ValueError(
                f"{path}: {key}={shorten(value)}, but the tokenizer has no token {i}: "
                f"its ids are 0 to {vocabulary.vocabulary_size - 1}; correct the file"
            )
    return tuple(dict.fromkeys(ids))


def _named(
    value: Any, key: str, path: pathlib.Path, vocabulary: Vocabulary
) -> tuple[int, ...]:
    if value is None or value == "":
        return ()
    name = content(value)
    if name is None:
        raise ValueError(
            f"{path}: {key}={shorten(value)} must be a token, or an object with its "
            "content"
        )
    index = vocabulary.find(name)
    if index is None:
        raise ValueError(
            f"{path}: {key}={name!r} is not in the tokenizer's vocabulary; correct "
            "the file, or give the tokenizer that belongs to it"
        )
    return (index,)


def content(token: Any) -> str | None:
    """Text of a token that a file gives as a string or as an object, or None."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
