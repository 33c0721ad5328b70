"""Tokens of texts on disk, so that each text is tokenized once, by one process."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import filelock
import numpy as np

from train.packing import Documents

# Written at once: few system calls, little memory.
CHUNK_TOKENS = 2**20
CHECKED_BYTES = 2**24
ABOUT = "about.json"
COLUMNS = ("tokens", "ends")

# Whether it is held out, tokens, and whether a document ends with them. What is held
# out comes last.
Parts = Iterator[tuple[bool, np.ndarray, bool]]
# Given a list to which it adds what a user should know of the text.
Build = Callable[[list[str]], Parts]


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


def default_directory() -> pathlib.Path:
    """Where tokens are kept unless a directory is given: in the user's cache."""
    home = os.path.expanduser("~")
    if home == "~":  # a container's user without a home
        return pathlib.Path(tempfile.gettempdir(), f"subtrack_jax-{os.getuid()}")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path(home, ".cache")
    return pathlib.Path(cache, "subtrack_jax", "tokens")


class TokenCache:
    """A directory of tokens, each text's under a name made of all that decides them.

    Processes that want the same tokens wait for the one that came first. What is
    there appears at once and is checked when it is opened: damaged tokens are made
    anew. Where nothing can be written, tokens are held in memory.
    """

    def __init__(self, directory: pathlib.Path, report: Callable[[str], None]):
        self._directory = directory.expanduser().absolute()
        self._report = report

    def get(self, identity: Any, build: Build) -> Tokens:
        """The tokens of a text, memory-mapped, and made if they are not there.

        Args:
          identity: JSON of all that decides the tokens.
          build: makes them.
        """
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self._directory / name[:32]
        partial = path.with_name(f".{path.name}.partial")
        with contextlib.ExitStack() as stack:
            tokens = self._open(path, self._report)
            if tokens is not None:
                return tokens
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._lock(path))
                self._remove_abandoned()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            except (OSError, NotImplementedError) as error:
                self._report_failure(error)
                return _Growing(None).fill(build)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            # Perhaps made by the one that held the lock.
            found = self._open(path, lambda message: None)
            return found or self._build(path, partial, build)

    def _build(self, path: pathlib.Path, partial: pathlib.Path, build: Build) -> Tokens:
        growing = _Growing(partial)
        tokens = growing.fill(build)
        try:
            growing.finish()
            if path.is_dir():  # damaged
                shutil.rmtree(path)
            os.replace(partial, path)
        except OSError as error:
            self._report_failure(error)
        return tokens

    @contextlib.contextmanager
    def _lock(self, path: pathlib.Path) -> Iterator[None]:
        lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            self._report("waiting for another process, which tokenizes the same text")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _open(self, path: pathlib.Path, report: Callable[[str], None]) -> Tokens | None:
        if not path.exists():
            return None
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"the tokens in {path} are damaged and made anew: {error}")
            return None

    def _remove_abandoned(self) -> None:
        """Removes what processes that were killed have not finished."""
        for partial in self._directory.glob(".*.partial"):
            lock = filelock.FileLock(partial.with_suffix(".lock"), blocking=False)
            with contextlib.suppress(filelock.Timeout), lock:
                shutil.rmtree(partial, ignore_errors=True)

    def _report_failure(self, error: Exception) -> None:
        self._report(
            f"tokens cannot be kept in {self._directory} ({error}): this run works, "
            "but the next one tokenizes the text again; give another --token-cache-dir"
        )


class _Column:
    """An array that grows on disk; in memory from when the disk takes no more."""

    def __init__(self, path: pathlib.Path | None):
        self.path, self.error = path, None
        self.count, self.checksum, self.dtype = 0, 0, np.dtype(np.uint16)
        self._file: BinaryIO | None = None
        self._waiting: list[np.ndarray] = []
        self._waiting_count = 0
        self._in_memory: list[np.ndarray] = []

    def append(self, values: np.ndarray) -> None:
        self.dtype = values.dtype
        self._waiting.append(values)
        self._waiting_count += len(values)
        if self._waiting_count >= CHUNK_TOKENS:
            self._flush()

    @property
    def size(self) -> int:
        return self.count + self._waiting_count

    def array(self) -> np.ndarray:
        self._flush()
        if self.path is None:
            return np.concatenate([np.empty(0, self.dtype), *self._in_memory])
        if self._file is not None:
            self._file.close()
        return _map(self.path, self.dtype, self.count)

    def _flush(self) -> None:
        data = np.concatenate([np.empty(0, self.dtype), *self._waiting])
        self._waiting, self._waiting_count = [], 0
        if self.path is not None:
            try:
                self._write(data)
            except OSError as error:
                self._go_to_memory(error)
        if self.path is None:
            self._in_memory.append(data)
        self.count += len(data)

    def _write(self, data: np.ndarray) -> None:
        if self._file is None:
            self._file = self.path.open("wb", buffering=0)
        rest = memoryview(data.tobytes())
        while rest:  # a disk with a little space takes a part
            rest = rest[self._file.write(rest) :]
        self.checksum = zlib.crc32(data, self.checksum)

    def _go_to_memory(self, error: OSError) -> None:
        if self._file is not None:
            self._file.close()
            self._in_memory.append(np.fromfile(self.path, self.dtype, self.count))
            self.path.unlink()
        self.path, self.error = None, error


class _Growing:
    """Tokens while they are made."""

    def __init__(self, directory: pathlib.Path | None):
        self._directory = directory
        self._columns = {
            name: _Column(directory and directory / name) for name in COLUMNS
        }
        self._content: dict[str, Any] = {}

    def fill(self, build: Build) -> Tokens:
        notes: list[str] = []
        tokens, ends = self._columns.values()
        total, train = 0, (0, 0)
        for is_held_out, part in itertools.groupby(
            build(notes), operator.itemgetter(0)
        ):
            for _, values, is_end in part:
                tokens.append(values)
                total += len(values)
                if is_end:
                    ends.append(np.array([total], np.uint64))
            if not is_end:  # cut in two, where what is held out begins
                ends.append(np.array([total], np.uint64))
            if not is_held_out:
                train = total, ends.size
        self._content = {"train": train, "notes": notes}
        return _split(tokens.array(), ends.array(), train, notes)

    def finish(self) -> None:
        """Describes the files, for `_load`.

        Raises:
          OSError: what is described is not all on disk.
        """
        for name, column in self._columns.items():
            if column.error is not None:
                raise column.error
            self._content[name] = [column.dtype.name, column.count, column.checksum]
        about = {"content": self._content, "crc32": _checksum_of(self._content)}
        (self._directory / ABOUT).write_text(json.dumps(about))


def _load(path: pathlib.Path) -> Tokens:
    """What `_Growing` wrote; raises ValueError and others if it is damaged."""
    about = json.loads((path / ABOUT).read_text())
    content = about["content"]
    if about["crc32"] != _checksum_of(content):
        raise ValueError(f"{ABOUT} is not what was written")
    arrays = []
    for name in COLUMNS:
        dtype, count, checksum = content[name]
        file = path / name
        found = 0
        with file.open("rb") as data:
            while block := data.read(CHECKED_BYTES):
                found = zlib.crc32(block, found)
        if found != checksum:
            raise ValueError(f"{name} is not what was written")
        arrays.append(_map(file, np.dtype(dtype), count))
    return _split(*arrays, content["train"], content["notes"])


def _split(
    tokens: np.ndarray, ends: np.ndarray, train: Sequence[int], notes: list[str]
) -> Tokens:
    count, documents = train
    return Tokens(
        Documents(tokens[:count], ends[:documents]),
        Documents(tokens[count:], ends[documents:] - np.uint64(count)),
        notes,
    )


def _map(path: pathlib.Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not count:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", shape=(count,))


def _checksum_of(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
