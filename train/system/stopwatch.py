"""Stopwatch for the laps of a loop."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Stopwatch for laps, without pauses."""

    def __init__(self):
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or the creation), without pauses."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the `with` block from the lap."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before
