"""Fixtures of program tests: own caches, finished runs."""

import logging
import os
import pathlib
import sys
from typing import NamedTuple

import filelock
import pytest

from tests.train.finished import make_run
from tests.train.program import CACHE, FLAGS, run
from tests.train.tokenization.test_tokenizer import TEXT
from train.tokenization.tokenizer import Tokenizer


@pytest.fixture(autouse=True, scope="session")
def own_cache():
    """Tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(CACHE))
        yield


@pytest.fixture(autouse=True)
def loud_orbax(monkeypatch):
    """Restores the logging that `quiet_orbax` changes."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """Programs that run in this process leave JAX and the user's cache alone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The directory of a small run, to read only."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    make_run(directory, Tokenizer.train([TEXT], 300))
    return directory


class Uninterrupted(NamedTuple):
    """A run of train.pretrain with `FLAGS`, and what it printed."""

    directory: pathlib.Path
    out: str
    err: str


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A run from its first to its last step, in one process for all workers of xdist.

    To read only.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory = base / "uninterrupted"
    printed = [base / f"uninterrupted.{name}" for name in ("out", "err")]
    with filelock.FileLock(base / "uninterrupted.lock"):
        if not printed[-1].exists():
            done = run(*FLAGS, "--output-dir", directory)
            assert done.returncode == 0, done.stderr
            for path, text in zip(printed, (done.stdout, done.stderr), strict=True):
                path.write_text(text)
    return Uninterrupted(directory, *(path.read_text() for path in printed))
