"""Tokens that end, begin and pad texts, as a model's own files name them."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from models import safetensors_files
from train.system import files

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
# In the order in which they are asked.
FILES = (
    GENERATION_FILE,
    TOKENIZER_FILE,
    "special_tokens_map.json",
    "config.json",
)
# Names of usual tokenizers, for those whose files name none: GPT's and LLaMA's first.
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
# Entries of tokenizer_config.json that a saved tokenizer keeps.
_KEPT_SETTINGS = ("chat_template", "padding_side", "unk_token")
TEMPLATE_FILE = "chat_template.jinja"
ADDED_FILE = "added_tokens.json"
# All that is read beside a tokenizer's own file.
BESIDE = (*FILES, TEMPLATE_FILE, ADDED_FILE)
# Classes that put BOS before texts unless their file says otherwise.
_CLASSES_WITH_BEGIN = ("LlamaTokenizer", "LlamaTokenizerFast")
# An id that transformers takes for "there is none".
_NO_ID = -1


class Vocabulary(Protocol):
    """What `read` has to know of a tokenizer."""

    vocabulary_size: int

    def find(self, name: str) -> int | None:
        """The id of a token."""

    def name(self, index: int) -> str | None:
        """The token of an id."""


class SpecialTokens(NamedTuple):
    """Ids of the tokens with a role.

    Attributes:
      ends: end a text, the one that training puts there first; empty: unknown.
      begin: begins a text; None: there is none.
      padding: fills a batch; None: there is none.
    """

    ends: tuple[int, ...] = ()
    begin: int | None = None
    padding: int | None = None

    @property
    def all(self) -> tuple[int, ...]:
        """Every token with a role, once."""
        given = [*self.ends, self.begin, self.padding]
        return tuple(dict.fromkeys(i for i in given if i is not None))


def read(directories: Sequence[pathlib.Path], vocabulary: Vocabulary) -> SpecialTokens:
    """Reads the special tokens from `FILES`, as Hugging Face's programs write them.

    A role is that of the first file that names it, but all are checked. They name it
    by id or by a list of ids (`eos_token_id`), or by token, as a string or an object
    (`eos_token`).

    Args:
      directories: hold some of the files; an earlier directory comes first.
      vocabulary: the tokenizer.

    Raises:
      ValueError: a file is damaged, or names what the vocabulary does not have.
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
    """Adds what no file names: as the vocabulary has it, else by usual names.

    Where files name the end of a text but no beginning, there is none.

    Args:
      tokens: from `read`.
      find: gives the id of a token.
      **found: `end` and `begin` as the vocabulary has them.

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
                f"a {TOKENIZER_FILE} beside the tokenizer's file; usual names are "
                f"{', '.join(END_NAMES)}"
            )
        tokens = tokens._replace(ends=(end,))
    return tokens


class Kept(NamedTuple):
    """What else a model's files say of its tokenizer, to be handed on."""

    settings: dict[str, Any]  # entries of tokenizer_config.json
    generation: dict[str, Any]  # entries of generation_config.json
    adds_begin: bool | None = None  # whether texts begin with the token; None: unsaid


def read_kept(directories: Sequence[pathlib.Path]) -> Kept:
    """Reads what `save` hands on; arguments and errors are those of `read`."""
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
            f"{TOKENIZER_FILE} in {directories[0]}: add_bos_token={short(adds_begin)} "
            "must be true or false"
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
    """Writes tokenizer_config.json and generation_config.json.

    Args:
      directory: where to.
      tokens: what the files name.
      name: gives the token of an id.
      kept: further entries.
      settings: further entries of tokenizer_config.json.
    """
    roles = {"eos": tokens.ends[0], "bos": tokens.begin, "pad": tokens.padding}
    names = {f"{role}_token": name(i) for role, i in roles.items() if i is not None}
    for file, entries in (
        (TOKENIZER_FILE, kept.settings | settings | names),
        (GENERATION_FILE, kept.generation | ids(tokens)),
    ):
        files.write_whole(directory / file, json.dumps(entries, indent=2) + "\n")


def ids(tokens: SpecialTokens) -> dict[str, Any]:
    """The entries of generation_config.json and of a model's config.json."""
    ends = tokens.ends[0] if len(tokens.ends) == 1 else list(tokens.ends)
    roles = {"eos": ends, "bos": tokens.begin, "pad": tokens.padding}
    return {f"{role}_token_id": i for role, i in roles.items() if i is not None}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; nothing if there is no such file.

    Raises:
      ValueError: it holds something else.
      OSError: it cannot be read.
    """
    return safetensors_files.read_json(path) if path.is_file() else {}


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: fetch it anew") from error


def _ids(
    value: Any, key: str, path: pathlib.Path, vocabulary: Vocabulary
) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None and i != _NO_ID]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(
                f"{path}: {key}={short(value)} must be the id of a token, or a list "
                "of ids"
            )
        if i < 0 or vocabulary.name(i) is None:
            raise ValueError(
                f"{path}: {key}={short(value)}, but the tokenizer has no token {i}: "
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
            f"{path}: {key}={short(value)} must be a token, or an object with its "
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
    """The token itself, which files give as a string or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def short(value: Any) -> str:
    """A value, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
