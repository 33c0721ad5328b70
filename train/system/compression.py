"""Compressed files: detection by content, reading with truncation errors."""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

BLOCK_BYTES = 2**20

_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
_SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
}


def split_name(name: str) -> tuple[pathlib.PurePath, str | None]:
    """Splits a file's name into the name in lower case and its compression.

    Example:
      >>> split_name("Part.JSON.gz")
      (PurePosixPath('part.json'), 'gzip')
    """
    lower = pathlib.PurePosixPath(name.lower())
    named = _SUFFIXES.get(lower.suffix)
    return (lower.with_suffix("") if named else lower), named


def find_compression(path: pathlib.Path) -> str | None:
    """Detects a file's compression from its first bytes; None: none that is supported.

    Raises:
      OSError: the file cannot be read.
    """
    with open_bytes(path, None) as file:
        start = file.read(16)
    return next((name for name, form in _MAGIC.items() if form.match(start)), None)


@contextlib.contextmanager
def open_bytes(path: pathlib.Path, compression: str | None) -> Iterator[BinaryIO]:
    """Opens a file for reading its decompressed bytes.

    Raises:
      OSError: the file cannot be read, is damaged or truncated.
    """
    openers: dict[str | None, Callable[..., Any]] = {
        None: open,
        "gzip": gzip.open,
        "bzip2": functools.partial(_open_streams, bz2.BZ2Decompressor),
        "xz": functools.partial(_open_streams, lzma.LZMADecompressor),
        "zstd": _open_zstd,
    }
    try:
        with openers[compression](path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise OSError(f"cannot read {path}: {error}") from error


@contextlib.contextmanager
def _open_zstd(path: pathlib.Path, mode: str) -> Iterator[BinaryIO]:
    # pyarrow, because the package zstandard does not detect truncated files.
    import pyarrow

    with open(path, mode) as file, pyarrow.PythonFile(file, mode="r") as source:
        stream = pyarrow.CompressedInputStream(source, "zstd")
        with io.BufferedReader(_Readable(stream), BLOCK_BYTES) as buffered:
            yield buffered


@contextlib.contextmanager
def _open_streams(
    new: Callable[[], Any], path: pathlib.Path, mode: str
) -> Iterator[BinaryIO]:
    # Not bz2.open and lzma.open: they take a damaged start of a stream for the end.
    with (
        open(path, mode) as file,
        io.BufferedReader(_Streams(file, new), BLOCK_BYTES) as buffered,
    ):
        yield buffered


class _Streams(io.RawIOBase):
    """Raw file of concatenated compressed streams, which zeros may separate.

    Args:
      file: the compressed file.
      new: creates a bz2 or lzma decompressor for one stream.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]):
        self._file, self._new, self._stream = file, new, new()
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._stream.eof or self._go_to_next():
            data, self._waiting = self._waiting, b""
            if self._stream.needs_input and not data:
                data = self._file.read(BLOCK_BYTES)
                if not data:
                    raise EOFError("the file is truncated")
            if block := self._stream.decompress(data, len(buffer)):
                buffer[: len(block)] = block
                return len(block)
        return 0

    def _go_to_next(self) -> bool:
        self._waiting = self._stream.unused_data.lstrip(b"\0")
        while not self._waiting and (block := self._file.read(BLOCK_BYTES)):
            self._waiting = block.lstrip(b"\0")
        if self._waiting:
            self._stream = self._new()
        return bool(self._waiting)


class _Readable(io.RawIOBase):
    """Raw file around an input stream of pyarrow."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(buffer)
