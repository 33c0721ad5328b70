"""Tokens of texts on disk, so that each text is tokenized once, by one process."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import filelock

from train import files, token_files
from train.token_files import Build, GrowingTokens, Tokens


class TokenCache:
    """A directory of tokens, each text's under a name made of all that decides them.

    Processes that want the same tokens wait for the one that came first. What is
    there appears at once and is checked when it is opened: damaged tokens are made
    anew. Where nothing can be written, tokens are held in memory.

    Args:
      directory: "auto" is one in the user's cache, "none" holds tokens in memory.
      report: told what a user should know, in a line.
    """

    def __init__(self, directory: str, report: Callable[[str], None]):
        self._report, self._is_used = report, directory != "none"
        given = pathlib.Path(os.path.expanduser(directory)).absolute()
        self._directory = files.user_cache("tokens") if directory == "auto" else given

    def get(self, identity: Any, build: Build) -> Tokens:
        """The tokens of a text, on disk, and made if they are not there.

        Args:
          identity: JSON of all that decides the tokens.
          build: makes them.
        """
        if not self._is_used:
            return GrowingTokens(None).fill(build)
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
                return GrowingTokens(None).fill(build)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            # Perhaps made by the one that held the lock.
            found = self._open(path, lambda message: None)
            return found or self._build(path, partial, build)

    def _build(self, path: pathlib.Path, partial: pathlib.Path, build: Build) -> Tokens:
        growing = GrowingTokens(partial)
        tokens = growing.fill(build)
        try:
            growing.describe()
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
            return token_files.read(path)
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
