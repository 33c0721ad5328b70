"""Local text files: found by a pattern, read in the order of their names."""

import collections
import dataclasses
import glob
import io
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from train.data.formats import read_file
from train.data.notes import Notes
from train.data.pieces import Piece, split_documents
from train.system.compression import split_name

EMBEDDED_TEXT = pathlib.Path(__file__).parents[1] / "corpus" / "moby-dick.txt.gz"
FINGERPRINT_BLOCK_BYTES = 2**16
# Files of a directory inspected to find the most common suffix.
LISTED_FILES = 1000


def find_files(
    pattern: str | None, flag: str = "--data-glob", notes: Notes | None = None
) -> list[pathlib.Path]:
    """Files that match a pattern, sorted; the project's own text for None.

    Directories and files whose names have brackets, ~ and so on are found as they
    are written. As in a shell, * leaves out names that begin with a dot. A file with
    several names, by links, is found once.

    Args:
      pattern: as in a shell, ** for directories at any depth.
      flag: the command line's name for it, for messages.
      notes: called with matches that are skipped.

    Raises:
      ValueError: no file matches.
    """
    if pattern is None:
        return [EMBEDDED_TEXT]
    notes = notes or Notes()
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        raise ValueError(
            f"{flag} {pattern!r} is a directory: {_pattern_of_files(expanded)!r} "
            "matches the files in it"
        )
    if os.path.exists(expanded) and not os.path.isfile(expanded):
        raise ValueError(
            f"{flag} {pattern!r} is a pipe or a device, which can be read only once: "
            "write it to a file"
        )
    matches = list(_match(_escape_what_exists(expanded), notes))
    matches = matches or list(_match(expanded.replace("[", "[[]"), notes))
    paths = _read_once(sorted(map(pathlib.Path, set(matches))), pattern, notes)
    if paths:
        return paths
    if directories := sorted(filter(os.path.isdir, matches)):
        raise ValueError(
            f"no file matches {flag} {pattern!r}, only directories: "
            f"{_pattern_of_files(directories[0])!r} matches the files in one of them"
        )
    lines = "; ".join(["check it, and quote it", *notes.lines()])
    raise ValueError(f"no file matches {flag} {pattern!r}; {lines}")


def _match(pattern: str, notes: Notes) -> Iterator[str]:
    """Paths that match; unlike glob's, ** terminates on cyclic links."""
    parts = pathlib.PurePath(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    rest = tuple(itertools.dropwhile("**".__eq__, parts[at:])) or ("*",)
    tops = glob.iglob(str(pathlib.PurePath(*parts[:at])))
    for top in filter(os.path.isdir, tops):
        for directory in _walk(top, notes):
            inner = pathlib.PurePath(glob.escape(directory), *rest)
            yield from _match(str(inner), notes)


def _walk(top: str, notes: Notes) -> Iterator[str]:
    """A directory and all below it, links followed, each directory once."""

    def note(error: OSError) -> None:
        notes.add("directories that cannot be read", f"{error.filename}: {error}")

    seen = {os.path.realpath(top)}
    for directory, names, _ in os.walk(top, onerror=note, followlinks=True):
        yield directory
        found = {
            os.path.realpath(os.path.join(directory, name)): name
            for name in sorted(names, reverse=True)
            if not name.startswith(".")
        }
        names[:] = sorted(name for path, name in found.items() if path not in seen)
        seen |= found.keys()


def _read_once(
    paths: list[pathlib.Path], pattern: str, notes: Notes
) -> list[pathlib.Path]:
    """Regular files among paths, each file under one name."""
    files: dict[str, pathlib.Path] = {}
    for path in paths:
        if path.is_dir():
            if "**" not in pattern:
                notes.add("directories that match, but not the files in them", path)
        elif not path.is_file():
            notes.add("broken links, pipes and devices that are left out", path)
        elif files.setdefault(os.path.realpath(path), path) != path:
            notes.add("further names of the same files, left out", path)
    return list(files.values())


def _pattern_of_files(directory: str) -> str:
    """Pattern for the most common kind of files in a directory."""
    everything = str(pathlib.Path(glob.escape(directory), "**", "*.*"))
    names = itertools.islice(_match(everything, Notes()), LISTED_FILES)
    suffixes = collections.Counter(
        "".join(path.suffixes[-2:] if split_name(path.name)[1] else [path.suffix])
        for path in map(pathlib.PurePath, names)
    )
    suffix = max(suffixes, key=suffixes.__getitem__, default=".txt")
    return str(pathlib.Path(directory, "**", f"*{suffix}"))


def _escape_what_exists(pattern: str) -> str:
    """Escapes brackets in a pattern where a path of that name exists."""
    found = pathlib.Path()
    parts = pathlib.Path(pattern).parts
    for count, part in enumerate(parts):
        if not os.path.lexists(found / part):
            return str(pathlib.Path(glob.escape(str(found)), *parts[count:]))
        found /= part
    return glob.escape(str(found))


def fingerprint(paths: list[pathlib.Path]) -> list[dict[str, Any]]:
    """Name, size and checksum of each file, reading only parts of large ones.

    The checksum covers the first and the last 64 KiB. Directories are left out, so
    that files which were moved together keep their fingerprint.

    Example:
      >>> fingerprint([EMBEDDED_TEXT])
      [{'name': 'moby-dick.txt.gz', 'bytes': 486697, 'crc32': 2591207979}]

    Raises:
      OSError: a file cannot be read.
    """
    return [_fingerprint_of_file(path) for path in paths]


def _fingerprint_of_file(path: pathlib.Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            first = file.read(FINGERPRINT_BLOCK_BYTES)
            size = file.seek(0, io.SEEK_END)
            file.seek(max(len(first), size - FINGERPRINT_BLOCK_BYTES))
            checksum = zlib.crc32(file.read(), zlib.crc32(first))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error}") from error
    return {"name": path.name, "bytes": size, "crc32": checksum}


@dataclasses.dataclass(frozen=True)
class LocalText:
    """Documents of local files, read sequentially.

    Attributes:
      paths: the files, in any of the formats of `train.data.formats`.
      text_field: field of rows that holds the text.
      skip_bad: whether documents that cannot be read are counted, not raised.
    """

    paths: list[pathlib.Path]
    text_field: str = "text"
    skip_bad: bool = False

    def pieces(self, notes: Notes | None = None) -> Iterator[Piece]:
        """The text in pieces, see `split_documents`; blank documents are left out.

        Args:
          notes: called with messages for the user.

        Raises:
          ValueError: a document is not UTF-8, no JSON object, or without the field.
          OSError: a file cannot be read.
        """
        return split_documents(self._documents(notes or Notes()))

    def _documents(self, notes: Notes) -> Iterator[Iterable[str]]:
        for path in self.paths:
            has_text = False
            for document in self._read(path, notes):
                blocks = iter([document] if isinstance(document, str) else document)
                first = []
                for block in blocks:
                    first.append(block)
                    if block.strip():
                        has_text = True
                        yield itertools.chain(first, blocks)
                        break
            if not has_text:
                notes.add("files without text", path)

    def _read(self, path: pathlib.Path, notes: Notes) -> Iterator[str | Iterator[str]]:
        try:
            for document in read_file(path, self.text_field, notes):
                if isinstance(document, ValueError):
                    self._skip(document, notes)
                    continue
                if self.skip_bad and not isinstance(document, str):
                    # Read to the end before use, as any byte may be invalid.
                    collections.deque(document, maxlen=0)
                    document = next(read_file(path, self.text_field, Notes()))
                yield document
        except (ValueError, OSError) as error:
            self._skip(error, notes)

    def _skip(self, error: Exception, notes: Notes) -> None:
        if not self.skip_bad:
            raise error
        notes.add("documents skipped", error)
