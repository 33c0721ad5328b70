"""Diagnosis of unreadable checkpoints: damaged files, or trouble of the process."""

import errno
import json
import pathlib
import re
import zlib
from typing import Any, NamedTuple

from train.system import files

FILES = "files.json"
# Larger files are covered by the checksums of the arrays.
_MOST_BYTES_TO_SUM = 2**24

# Errors of the process or the file system; the checkpoint may be undamaged.
_OWN_TROUBLE = {
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EACCES,
    errno.EPERM,
    errno.EINTR,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
}
_OWN_TROUBLE_WORDS = re.compile(
    r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|CANCELLED"
    r"|ABORTED|out of memory",
    re.IGNORECASE,
)
_STATUS = re.compile(r"([A-Z]{3}[A-Z_]+): ")
_DAMAGE_WORDS = re.compile(
    r"DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION|INVALID_ARGUMENT"
)


class ContentError(ValueError):
    """Content that was read without an error but differs from what was saved."""


class MisfitError(ValueError):
    """An undamaged checkpoint that this program cannot use."""


class Diagnosis(NamedTuple):
    """Reason why a checkpoint cannot be read, and whether it is damaged."""

    reason: str
    is_damage: bool


def list_files(directory: pathlib.Path) -> None:
    """Writes the list of a new checkpoint's files into it and flushes all to disk.

    Raises:
      OSError: a file cannot be read, written or flushed.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        # Files outside of the items are optional, and Orbax still writes to them.
        if path.is_file() and path.parent != directory:
            entries[str(path.relative_to(directory))] = entry = {
                "bytes": path.stat().st_size
            }
            if entry["bytes"] <= _MOST_BYTES_TO_SUM:
                entry["crc32"] = zlib.crc32(path.read_bytes())
    files.write_whole(directory / FILES, json.dumps(entries, indent=1) + "\n")
    files.sync(directory)


def diagnose(error: Exception, directory: pathlib.Path) -> Diagnosis:
    """Finds out whether a failed read was caused by damage.

    Args:
      error: the exception raised while reading.
      directory: the checkpoint.
    """
    if isinstance(error, MisfitError) or _is_own_trouble(error):
        return Diagnosis(explain(error, directory), is_damage=False)
    try:
        wrong = _wrong_files(directory)
    except OSError as second:
        return Diagnosis(explain(second, directory), is_damage=False)
    if wrong:
        first, *others = (f"{name} {fault}" for name, fault in wrong.items())
        more = f", and {len(others)} other files" if others else ""
        return Diagnosis(first + more, is_damage=True)
    has_evidence = (
        wrong is None  # no list of files
        or isinstance(error, ContentError)
        or any(_DAMAGE_WORDS.search(str(each)) for each in _chain(error))
    )
    return Diagnosis(explain(error, directory), has_evidence)


def explain(error: Exception, directory: pathlib.Path) -> str:
    """Shortens an error of Orbax or TensorStore to one line: file and reason.

    >>> text = (
    ...     'DATA_LOSS: Error opening "zarr" driver: Error reading "head/.zarray" in '
    ...     'OCDBT database at local file "/run/9/params/": Error decoding local file '
    ...     '"/run/9/params/manifest.ocdbt": Error decoding manifest: CRC-32C checksum '
    ...     "verification failed [tensorstore_spec='...']"
    ... )
    >>> explain(ValueError(text), pathlib.Path("/run/9"))
    'params/manifest.ocdbt: CRC-32C checksum verification failed'
    """
    # Orbax wraps TensorStore's errors, which begin with a status.
    texts = [_text(each) for each in _chain(error)]
    text = next(filter(_STATUS.match, texts), ": ".join(texts))
    status = _STATUS.match(text)
    paths = re.findall(r'(?:local file|OCDBT database at) "([^"]+)"', text)
    if status is None:
        return _shortened(text)
    text = re.sub(r" \[(tensorstore_spec|os_error_code|source locations).*", "", text)
    reason = re.split(r'"[^"]*": ', text)[-1].removeprefix("Error decoding manifest: ")
    reason = reason.removeprefix(f"{status[1]}: ")
    if status[1] == "NOT_FOUND":
        reason = "is missing or incomplete"
    if not paths:
        return _shortened(reason)
    path = pathlib.Path(paths[-1])
    if path.is_relative_to(directory):
        path = path.relative_to(directory)
    return f"{path}: {_shortened(reason)}"


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return where + error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def os_error_number(error: BaseException) -> int | None:
    """Errno of an error or its causes, also from TensorStore's text."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno is not None:
            return each.errno
        if found := re.search(r"os_error_code='?(\d+)", str(each)):
            return int(found[1])
    return None


def _is_own_trouble(error: Exception) -> bool:
    return os_error_number(error) in _OWN_TROUBLE or any(
        isinstance(each, MemoryError) or _OWN_TROUBLE_WORDS.search(str(each))
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Any:
    """Yields an error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__


def _wrong_files(directory: pathlib.Path) -> dict[str, str] | None:
    """Faults of listed files by name; None if there is no list."""
    listed = directory / FILES
    if not listed.exists():
        return None
    try:
        entries = json.loads(listed.read_bytes())
        faults = {
            name: _fault(directory / name, entry) for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return {FILES: "has changed since it was written"}
    return {name: fault for name, fault in faults.items() if fault is not None}


def _fault(path: pathlib.Path, entry: dict[str, int]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size:,} of {entry['bytes']:,} bytes"
    if "crc32" in entry and zlib.crc32(path.read_bytes()) != entry["crc32"]:
        return "has changed since it was written"
    return None


def _shortened(line: str) -> str:
    return line if len(line) <= 200 else f"{line[:200]}..."
