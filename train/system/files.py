"""Atomic file writes: old or new content, never half of it, flushed to the disk."""

import contextlib
import errno
import glob
import io
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# Directory and pattern of files that still lack their final name.
_unfinished: set[tuple[pathlib.Path, str]] = set()


def user_cache(name: str) -> pathlib.Path:
    """Directory of this name for what can be made again, in the user's cache."""
    candidates = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))
    # The standard (XDG) ignores relative paths, and not every user has a home.
    fallback = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    base = next(filter(os.path.isabs, candidates), fallback)
    return pathlib.Path(base, "subtrack_jax", name)


class WriteError(OSError):
    """A file that cannot be written, and why."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path for a file or a directory, which replaces `path` at the end.

    The content is flushed to the disk before it gets its name. After an exception
    `path` is as it was, and what was written is removed. A directory replaces only
    an empty one.

    Raises:
      WriteError: the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pathlib.Path(directory, "numbers.txt")
    ...     with replacing(path) as partial:
    ...         _ = partial.write_text("1 2 3")
    ...     path.read_text()
    '1 2 3'
    """
    partial = path.with_name(f".{path.name}.partial")
    mark = (path.parent, glob.escape(partial.name))
    _unfinished.add(mark)
    try:
        with errors_name(path, partial):
            _remove(partial)  # from a process that was killed
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent, recursive=False)
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
        _unfinished.discard(mark)


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Replaces a file at once, see `replacing`; text is written as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_figure(path: pathlib.Path, figure: Any, **options: Any) -> None:
    """Replaces a PNG by a drawing of matplotlib; `options` are those of `savefig`."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_whole(path, drawn.getvalue())


def append_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Adds to a file, all or nothing; `sync` flushes it to the disk.

    Raises:
      WriteError: the content cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with errors_name(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        rest = memoryview(data)
        try:
            while rest:  # a disk with a little space takes a part
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(before)
            raise


def append_lines(path: pathlib.Path, lines: str | bytes) -> None:
    """Adds lines to a file, behind the end of its last one, and flushes it.

    Raises:
      WriteError: the lines cannot be written.
    """
    with errors_name(path):
        # A last line that was cut short must not swallow the next one.
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            append_whole(path, "\n")
        append_whole(path, lines)
        sync(path)


def sync(path: pathlib.Path, *, recursive: bool = True) -> None:
    """Flushes a file, or a directory with all that is in it, to the disk.

    Args:
      path: the file or directory.
      recursive: False flushes only the names in the directory.

    Raises:
      OSError: something cannot be flushed.
    """
    for inner in path.iterdir() if recursive and path.is_dir() else ():
        sync(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush directories.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def errors_name(
    path: pathlib.Path, partial: pathlib.Path | None = None
) -> Iterator[None]:
    """Makes a WriteError of an OSError that names no file, as those of a full disk.

    An error of another file is not changed. One of a file in the directory `partial`,
    which is to become `path`, names the file in `path`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            file = pathlib.Path(os.fsdecode(error.filename))
            if partial is not None and file.is_relative_to(partial):
                path = path if file == partial else path / file.name
            elif file != path:
                raise
        reason = error.strerror or str(error)
        raise WriteError(error.errno, reason, str(path)) from error


def discard_at_once(directory: pathlib.Path, pattern: str) -> None:
    """Lets `discard_unfinished` remove what matches a pattern in a directory."""
    _unfinished.add((directory, pattern))


def discard_unfinished() -> None:
    """Removes what has no final name yet, for a program that ends at once."""
    for directory, pattern in tuple(_unfinished):
        discard(directory, pattern)


def discard(directory: pathlib.Path, pattern: str) -> None:
    """Removes what matches a pattern in a directory, as far as that is possible."""
    for _ in range(5):
        found = list(directory.glob(pattern))
        for partial in found:
            rest = partial.with_name(f".discarded.{partial.name}")
            # Another thread may be giving it its name; one of the two moves it.
            with contextlib.suppress(OSError):
                partial.rename(rest)
                _remove(rest)
        if not found:
            break
        time.sleep(0.02)  # another thread may still write to it


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
