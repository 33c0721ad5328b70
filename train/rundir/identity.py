"""Checksums of a run's text and tokenizer files, compared when it is resumed."""

import itertools
import json
import pathlib
import tempfile
from typing import Any, Protocol

from train.config.data_config import DataConfig, Source
from train.config.rules import flag
from train.data import sources
from train.system import files

IDENTITY_FILE = "data-files.json"

# Files that `Tokenizer.save` writes: one of the first two, and the others.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "generation_config.json"),
)

# Name, bytes and crc32 of each file, by the setting that names the files.
Files = dict[str, list[dict[str, Any]]]

_TOKENIZER = "data.tokenizer"


class Sources(Protocol):
    """Configuration of data that names its files."""

    @property
    def sources(self) -> dict[str, Source]:
        """Files by setting."""


def save(config: Sources, directory: pathlib.Path) -> None:
    """Saves the checksums of the text and of the run's own tokenizer.

    Raises:
      ValueError: the text cannot be found.
      OSError: a file cannot be read or written.
    """
    found = text_files(config)
    found[_TOKENIZER] = sources.fingerprint(_tokenizer_files(directory))
    files.write_whole(
        directory / IDENTITY_FILE, json.dumps(found, indent=1, default=str) + "\n"
    )


def load(directory: pathlib.Path) -> Files:
    """Loads the checksums that `save` wrote; empty for runs of earlier versions.

    Raises:
      ValueError: the file is damaged.
    """
    path = directory / IDENTITY_FILE
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_bytes())
        for each in itertools.chain.from_iterable(known.values()):
            _content(each)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged, which has the checksums of the run's files: delete it "
            "to continue without comparing them"
        ) from error
    return known


def check_tokenizer(directory: pathlib.Path) -> None:
    """Raises a ValueError if the run's own tokenizer is missing or has changed."""
    known = load(directory).get(_TOKENIZER, [])
    present = {path.name: path for path in _tokenizer_files(directory)}
    lost = [each["name"] for each in known if each["name"] not in present]
    if not lost and not present.keys() & set(TOKENIZER_FILES[:2]):
        lost = [" or ".join(TOKENIZER_FILES[:2])]
    if lost:
        raise ValueError(
            f"{directory} has lost its {', '.join(lost)}, without which its weights "
            "are of no use: put it back, or give another directory"
        )
    for each in known:
        (now,) = sources.fingerprint([present[each["name"]]])
        if _content(now) != _content(each):
            raise ValueError(
                f"{present[each['name']]} is not the one that the run began with: put "
                "that one back, or give another directory"
            )


def is_own_tokenizer(
    config: DataConfig, weights: pathlib.Path | None, directory: pathlib.Path
) -> bool:
    """Whether `config.tokenizer` has the same files as the run's own tokenizer."""
    from train.tokenization.tokenizer import Tokenizer  # slow to import

    if config.tokenizer is None:
        return False
    tokenizer = Tokenizer.open(config.tokenizer, weights)
    tokenizer.mark_documents(begin=config.bos or config.bos_and_eos, end=not config.bos)
    with tempfile.TemporaryDirectory() as copy:
        tokenizer.save(pathlib.Path(copy))
        theirs, ours = (
            {path.name: path.read_bytes() for path in _tokenizer_files(each)}
            for each in (pathlib.Path(copy), directory)
        )
    return theirs == ours


def compare_text(
    config: Sources, directory: pathlib.Path
) -> tuple[list[str], dict[str, str]]:
    """Compares the text files of a config with those of a run.

    Returns:
      Settings whose files are the same, even if moved; and for each other setting a
      description of the first difference.

    Raises:
      ValueError: there are no such files, or the checksums are damaged.
      OSError: a file cannot be read.
    """
    known = load(directory)
    same, other = [], {}
    for setting, now in text_files(config).items():
        if setting not in known:
            continue
        if difference := _difference(known[setting], now):
            other[setting] = difference
        else:
            same.append(setting)
    return same, other


def text_files(config: Sources) -> Files:
    """Fingerprints of the files of each setting; none for a dataset on the hub."""
    found = {name: _files_of(name, each) for name, each in config.sources.items()}
    return {name: sources.fingerprint(paths) for name, paths in found.items() if paths}


def _files_of(setting: str, source: Source) -> list[pathlib.Path]:
    if source.kind == "pattern":
        return sources.find_files(source.value, flag(setting))
    path = pathlib.Path(source.value).expanduser()
    if source.kind == "file":
        return [path]
    inside = sorted(path.rglob("*"))
    return [each for each in inside if each.is_file() and each.name[0] != "."]


def _tokenizer_files(directory: pathlib.Path) -> list[pathlib.Path]:
    paths = (directory / name for name in TOKENIZER_FILES)
    return [path for path in paths if path.is_file()]


def _difference(known: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Describes the first difference between two lists of files; "" if equal."""
    if len(known) != len(now):
        names, names_now = ({each["name"] for each in every} for every in (known, now))
        gone, new = sorted(names - names_now), sorted(names_now - names)
        one = f": {gone[0]} is gone" if gone else f": {new[0]} is new" if new else ""
        return f"{len(now)} files instead of {len(known)}{one}"
    for before, after in zip(known, now, strict=True):
        if before["bytes"] != after["bytes"]:
            sizes = f"{after['bytes']:,} bytes instead of {before['bytes']:,}"
            return f"{after['name']} has {sizes}"
        if before["crc32"] != after["crc32"]:
            return f"{after['name']} has other content than before"
    return ""


def _content(each: dict[str, Any]) -> tuple[int, int]:
    return each["bytes"], each["crc32"]
