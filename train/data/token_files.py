"""Files of tokens: written incrementally, read by slices, with checksums."""

import array
import dataclasses
import functools
import itertools
import json
import operator
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from train.data.encoding import Documents

# Bytes written at once: few system calls, little memory.
CHUNK_TOKENS = 2**20
CHUNK_DOCUMENTS = 2**12
CHECKED_BYTES = 2**24
ABOUT = "about.json"
COLUMNS = ("tokens", "ends")

# Whether held out, tokens, and whether a document ends with them; held-out pieces
# come last.
Parts = Iterator[tuple[bool, np.ndarray, bool]]
# Appends to a list what a user should know about the text.
Build = Callable[[list[str]], Parts]


class ArrayInFile:
    """Array in a file, read by slices: `numbers[5:9]`.

    Not memory-mapped: mapped pages count as memory of the process, more the longer it
    trains, and a file truncated meanwhile would end the process with a signal.
    """

    def __init__(self, path: pathlib.Path, dtype: np.dtype, start: int, stop: int):
        self._path, self._dtype, self._start, self._stop = path, dtype, start, stop
        self._file = path.open("rb", buffering=0)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        size, count = self._dtype.itemsize, max(stop - start, 0)
        offset = (self._start + start) * size
        data = os.pread(self._file.fileno(), count * size, offset)
        if len(data) < count * size:
            raise OSError(f"{self._path} was cut off while it was in use: start again")
        return np.frombuffer(data, self._dtype)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Attributes:
      train: documents to train on.
      held_out: documents held out.
      notes: what a user should know of the text.
    """

    train: Documents
    held_out: Documents
    notes: list[str]


class GrowingTokens:
    """Writes tokens to files of a directory incrementally.

    From when the disk takes no more, or without a directory, they are in memory.
    """

    def __init__(self, directory: pathlib.Path | None):
        self._directory = directory
        self._columns = {
            name: _Column(directory and directory / name) for name in COLUMNS
        }
        self._content: dict[str, Any] = {}

    def fill(self, build: Build) -> Tokens:
        """Writes all tokens."""
        notes: list[str] = []
        tokens, ends = self._columns.values()
        total, train, new_ends = 0, (0, 0), array.array("Q")
        parts = itertools.groupby(build(notes), operator.itemgetter(0))
        for is_held_out, part in parts:
            for _, values, is_end in part:
                tokens.append(values)
                total += len(values)
                if is_end:
                    new_ends.append(total)
                if len(new_ends) == CHUNK_DOCUMENTS:
                    ends.append(np.array(new_ends))
                    del new_ends[:]
            if not is_end:  # a document cut where the held-out part begins
                new_ends.append(total)
            ends.append(np.array(new_ends))
            del new_ends[:]
            if not is_held_out:
                train = total, len(ends)
        for name, column in self._columns.items():
            column.finish()
            self._content[name] = [column.dtype.name, len(column), column.checksum]
        self._content |= {"train": train, "notes": notes}
        return _divide(tokens.part, ends.part, self._content)

    def describe(self) -> None:
        """Writes the index that `read` needs.

        Raises:
          OSError: it cannot be written, or not all tokens are on the disk.
        """
        for column in self._columns.values():
            if column.error is not None:
                raise column.error
        about = {"content": self._content, "crc32": _checksum_of(self._content)}
        (self._directory / ABOUT).write_text(json.dumps(about))


def read(directory: pathlib.Path) -> Tokens:
    """Opens the files of `GrowingTokens` after verifying their checksums.

    Raises:
      OSError, ValueError, KeyError or TypeError: it is not there, or damaged.
    """
    about = json.loads((directory / ABOUT).read_text())
    content = about["content"]
    if about["crc32"] != _checksum_of(content):
        raise ValueError(f"{ABOUT} is not what was written")
    columns = []
    for name in COLUMNS:
        path = directory / name
        dtype, _, checksum = content[name]
        found = 0
        with path.open("rb") as data:
            while block := data.read(CHECKED_BYTES):
                found = zlib.crc32(block, found)
        if found != checksum:
            raise ValueError(f"{name} is not what was written")
        columns.append(functools.partial(ArrayInFile, path, np.dtype(dtype)))
    return _divide(*columns, content)


class _Column:
    """Array written to a file incrementally; kept in memory if writing fails."""

    def __init__(self, path: pathlib.Path | None):
        self.error: OSError | None = None
        self.checksum, self.dtype = 0, np.dtype(np.uint16)
        self._path, self._file = path, None
        self._waiting: list[np.ndarray] = []
        self._waiting_count = self._count = 0
        self._in_memory: list[np.ndarray] = []

    def __len__(self) -> int:
        return self._count + self._waiting_count

    def append(self, values: np.ndarray) -> None:
        self.dtype = values.dtype
        self._waiting.append(values)
        self._waiting_count += len(values)
        if self._waiting_count >= CHUNK_TOKENS:
            self._flush()

    def finish(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()
        self._in_memory = [np.concatenate([np.empty(0, self.dtype), *self._in_memory])]

    def part(self, start: int, stop: int) -> np.ndarray | ArrayInFile:
        if self._path is not None:
            return ArrayInFile(self._path, self.dtype, start, stop)
        return self._in_memory[0][start:stop]

    def _flush(self) -> None:
        data = np.concatenate([np.empty(0, self.dtype), *self._waiting])
        self._waiting, self._waiting_count = [], 0
        if self._path is not None:
            try:
                self._write(data)
            except OSError as error:
                self._go_to_memory(error)
        if self._path is None:
            self._in_memory.append(data)
        self._count += len(data)

    def _write(self, data: np.ndarray) -> None:
        if self._file is None:
            self._file = self._path.open("wb", buffering=0)
        rest = memoryview(data.tobytes())
        while rest:  # a nearly full disk may write a part only
            rest = rest[self._file.write(rest) :]
        self.checksum = zlib.crc32(data, self.checksum)

    def _go_to_memory(self, error: OSError) -> None:
        if self._file is not None:
            self._file.close()
            self._in_memory.append(np.fromfile(self._path, self.dtype, self._count))
            self._path.unlink()
        self._path, self.error = None, error


def _divide(
    tokens: Callable[[int, int], np.ndarray | ArrayInFile],
    ends: Callable[[int, int], np.ndarray | ArrayInFile],
    content: dict[str, Any],
) -> Tokens:
    """Both parts of a text, from functions that slice its columns."""
    (_, count, _), (_, documents, _) = (content[name] for name in COLUMNS)
    middle, first = content["train"]
    return Tokens(
        Documents(tokens(0, middle), ends(0, first)),
        Documents(tokens(middle, count), ends(first, documents)[:] - np.uint64(middle)),
        content["notes"],
    )


def _checksum_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
