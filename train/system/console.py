"""Errors and warnings of the programs: one line on stderr, never a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class Failure(SystemExit):
    """Exit code 2, after a message has been printed on stderr."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


def fail(message: str) -> NoReturn:
    """Prints an error on one line of stderr and exits with code 2."""
    message = " ".join(message.split())
    print("error:", message, file=sys.stderr)
    raise Failure(message)


def warn(message: str) -> None:
    """Prints a warning on one line of stderr."""
    print("warning:", " ".join(message.split()), file=sys.stderr)


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Calls `fail` for exceptions of these classes, which a user can cause."""
    try:
        yield
    except kinds as error:
        message, number = str(error), getattr(error, "errno", None)
        is_full = number in (errno.ENOSPC, errno.EDQUOT)
        if (is_full or number == errno.EPIPE) and not getattr(error, "filename", "-"):
            # Errors of files name the file; errors of print name nothing.
            message = f"cannot write to stdout: {error.strerror}"
        if is_full:
            message += ": free some space and run the same command again"
        fail(message)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Exits silently when the reader of a pipe closes it, as in `| head`."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # Python flushes the rest of the buffer once more at exit.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(0)
