"""Atomic file writes: a file has its old or its new content, flushed to disk."""

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

# Directory and pattern of files that are not renamed to their final name yet.
_unfinished: set[tuple[pathlib.Path, str]] = set()


def user_cache(name: str) -> pathlib.Path:
    """Subdirectory of the user's cache directory, by the XDG standard."""
    candidates = (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))
    # XDG ignores relative paths; expanduser returns one for a user without a home.
    fallback = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    base = next(filter(os.path.isabs, candidates), fallback)
    return pathlib.Path(base, "subtrack_jax", name)


class WriteError(OSError):
    """OSError of a failed write: file and reason."""

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Atomically replaces a file or directory: yields a temporary path to write to.

    At the end of the block the content is flushed to disk and renamed to `path`. After
    an exception `path` is unchanged and the temporary path is removed. A directory can
    replace only an empty one.

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
            _remove(partial)  # left by a killed process
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent, recursive=False)
    finally:
        with contextlib.suppress(OSError):
            _remove(partial)
        _unfinished.discard(mark)


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Atomically writes a file, see `replacing`; text is encoded as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_figure(path: pathlib.Path, figure: Any, **options: Any) -> None:
    """Atomically writes a matplotlib figure as PNG; `options` go to `savefig`."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    write_whole(path, drawn.getvalue())


def append_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Appends to a file, all or nothing; call `sync` to flush it to disk.

    Raises:
      WriteError: the content cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with errors_name(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        rest = memoryview(data)
        try:
            while rest:  # an almost full disk writes a part
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(before)
            raise


def append_lines(path: pathlib.Path, lines: str | bytes) -> None:
    """Appends lines to a file, ends an unfinished last line first, and flushes it.

    Raises:
      WriteError: the lines cannot be written.
    """
    with errors_name(path):
        # A truncated last line must not merge with the next one.
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            append_whole(path, "\n")
        append_whole(path, lines)
        sync(path)


def sync(path: pathlib.Path, *, recursive: bool = True) -> None:
    """Flushes a file, or a directory and its content, to disk.

    Args:
      path: the file or directory.
      recursive: False: flush only the directory's entries, not its files.

    Raises:
      OSError: the flush failed.
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
    """Converts OSErrors of a write to WriteErrors that name the file.

    Errors of a full disk name no file. Errors of other files are not converted. Those
    in the temporary directory `partial` name the file as it will be in `path`.
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
    """Registers a pattern of temporary files for `discard_unfinished`."""
    _unfinished.add((directory, pattern))


def discard_unfinished() -> None:
    """Removes all registered temporary files, before an immediate exit."""
    for directory, pattern in tuple(_unfinished):
        discard(directory, pattern)


def discard(directory: pathlib.Path, pattern: str) -> None:
    """Removes files that match a pattern in a directory; ignores errors."""
    for _ in range(5):
        found = list(directory.glob(pattern))
        for partial in found:
            rest = partial.with_name(f".discarded.{partial.name}")
            # Another thread may be renaming it to its final name: only one succeeds.
            with contextlib.suppress(OSError):
                partial.rename(rest)
                _remove(rest)
        if not found:
            break
        time.sleep(0.02)  # another thread may still be writing


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
