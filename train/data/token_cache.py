"""Cache of tokens on disk: each text is tokenized once, by one process."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import filelock

from train.data import token_files
from train.data.token_files import Build, GrowingTokens, Tokens
from train.system import files
from train.tokenization.tokenizer import Tokenizer

CHECKSUMS = "checksums.json"
KEPT_DAYS = 60

_NAME = "[0-9a-f]{32}"

Value = TypeVar("Value")


class TokenCache:
    """Directory of tokens and of the tokenizers trained for them.

    An entry is named by a hash of everything that determines it. Processes that need
    the same entry wait for the first one. Entries appear atomically, and a damaged one
    is written anew: opening verifies checksums of the content, the reason for a cache
    of our own. Where nothing can be written, tokens are held in memory.

    Args:
      directory: "auto" is one in the user's cache, "none" holds tokens in memory.
      report: called with one-line messages for the user.
    """

    def __init__(self, directory: str, report: Callable[[str], None]):
        self._report, self._is_used = report, directory != "none"
        self._has_failed = False
        given = pathlib.Path(os.path.expanduser(directory)).absolute()
        self._directory = files.user_cache("tokens") if directory == "auto" else given

    def tokens(self, identity: Any, build: Build) -> Tokens:
        """Tokens of a text on disk, written if they are missing.

        Args:
          identity: JSON of all that decides the tokens.
          build: makes them.
        """

        def make(partial: pathlib.Path | None) -> tuple[Tokens, Callable[[], None]]:
            growing = GrowingTokens(partial)
            return growing.fill(build), growing.describe

        return self._find_or_make(identity, token_files.read, make)

    def tokenizer(self, identity: Any, train: Callable[[], Tokenizer]) -> Tokenizer:
        """A tokenizer, trained if it is missing; arguments as in `tokens`."""

        def make(partial: pathlib.Path | None) -> tuple[Tokenizer, Callable[[], None]]:
            trained = train()
            return trained, lambda: _save_tokenizer(trained, partial)

        return self._find_or_make(identity, _load_tokenizer, make)

    def _find_or_make(
        self,
        identity: Any,
        read: Callable[[pathlib.Path], Value],
        make: Callable[[pathlib.Path | None], tuple[Value, Callable[[], None]]],
    ) -> Value:
        """Returns what `read` finds, or calls `make` and keeps the result."""
        if not self._is_used:
            return make(None)[0]
        data = json.dumps(identity, sort_keys=True).encode()
        path = self._directory / hashlib.sha256(data).hexdigest()[:32]
        partial = path.with_name(f".{path.name}.partial")
        with contextlib.ExitStack() as stack:
            found = _open(path, read, self._report)
            if found is not None:
                return found
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._lock(path))
                self._clean()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                files.discard_at_once(self._directory, partial.name)
            except (OSError, NotImplementedError) as error:
                self._report_failure(error)
                return make(None)[0]
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            # The process that held the lock may have written it.
            found = _open(path, read, lambda message: None)
            if found is not None:
                return found
            made, keep = make(partial)
            try:
                keep()
                if path.is_dir():  # damaged
                    shutil.rmtree(path)
                os.replace(partial, path)
            except OSError as error:
                self._report_failure(error)
            return made

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

    def _clean(self) -> None:
        """Removes leftovers of killed processes and entries unused for long.

        Other files in the directory are kept.
        """
        oldest = time.time() - KEPT_DAYS * 24 * 3600
        for path in self._directory.iterdir():
            if re.fullmatch(rf"\.{_NAME}\.partial", path.name):
                lock = filelock.FileLock(path.with_suffix(".lock"), blocking=False)
                with contextlib.suppress(filelock.Timeout), lock:
                    shutil.rmtree(path, ignore_errors=True)
            elif re.fullmatch(_NAME, path.name) and path.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)

    def _report_failure(self, error: Exception) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        self._report(
            f"tokens cannot be kept in {self._directory} ({error}): this run works, "
            "but the next one tokenizes the text again; give another --token-cache-dir"
        )


def _open(
    path: pathlib.Path,
    read: Callable[[pathlib.Path], Value],
    report: Callable[[str], None],
) -> Value | None:
    if not path.exists():
        return None
    try:
        found = read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        report(f"{path} is damaged, and made anew: {error}")
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # marks it as used
    return found


def _save_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    tokenizer.save(directory)
    checksums = json.dumps(_checksums(directory))
    (directory / CHECKSUMS).write_text(checksums)


def _load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    if json.loads((directory / CHECKSUMS).read_text()) != _checksums(directory):
        raise ValueError("the tokenizer is not what was written")
    return Tokenizer.load(directory)


def _checksums(directory: pathlib.Path) -> dict[str, int]:
    paths = (path for path in directory.iterdir() if path.name != CHECKSUMS)
    return {path.name: zlib.crc32(path.read_bytes()) for path in paths}
