"""Stopping between two steps, when asked to by a signal."""

import signal
from types import TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Interruption:
    """A context in which SIGTERM and the first Ctrl-C are noted, not obeyed.

    Attributes:
      received: the signal that came, or None. Whoever runs the loop asks `reached`
        after each step, saves and leaves.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before = {}

    @property
    def exit_code(self) -> int:
        """0 for SIGTERM, which a scheduler sends, 130 for Ctrl-C."""
        return 130 if self.received == signal.SIGINT else 0

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; several processes stop after the same."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            step
        ):
            self.received = signal.SIGTERM
        return self.received is not None

    def __enter__(self) -> Self:
        # One process alone cannot stop: JAX tells the others of its SIGTERM.
        is_alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if is_alone else ():
            # A process in the background ignores Ctrl-C, and goes on to.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)
        # Who asks twice does not want to wait.
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
