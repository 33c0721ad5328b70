"""Signals that stop a program: answered at once, obeyed between two steps.

Python runs a signal's handler only between two bytecodes of the main thread, which
may be minutes away while a program compiles. The C part of the handler writes the
signal's number to a pipe at once, and a thread reads it.
"""

import contextlib
import os
import signal
import threading
import time
from types import TracebackType
from typing import NoReturn, Self

from train.system import files

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """A context in which SIGTERM and the first Ctrl-C are answered, not obeyed.

    A second signal ends the program, with exit code 130 after Ctrl-C and 143 after
    SIGTERM; files that are not finished are removed.

    Args:
      answer: says on stderr what will happen after the first signal. None: the first
        signal ends the program.

    Attributes:
      received: the signal that came, or None. The loop asks `reached` after each
        step, saves and leaves.
    """

    def __init__(self, answer: str | None = None):
        self.received: signal.Signals | None = None
        self._answer = answer
        self._before = {}
        self._is_alone = True
        self._is_answered = threading.Semaphore(0)

    @property
    def exit_code(self) -> int:
        """0 for SIGTERM, which a scheduler sends, 130 for Ctrl-C."""
        return 130 if self.received == signal.SIGINT else 0

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; several processes stop after the same."""
        if not self._is_alone:
            from jax.experimental import multihost_utils

            is_reached = multihost_utils.reached_preemption_sync_point(step)
            if is_reached and self.received is None:
                self.received = signal.SIGTERM
                _say(f"SIGTERM: {self._answer}")
            return is_reached
        return self.received is not None

    def __enter__(self) -> Self:
        if self._answer is not None:
            import jax

            self._is_alone = jax.process_count() == 1
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._writing = writing
        self._wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[reading], daemon=True).start()
        # SIGTERM of one of several processes is JAX's: it tells the others.
        for number in _SIGNALS if self._is_alone else (signal.SIGINT,):
            # A process in the background ignores Ctrl-C, and goes on to.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._wait)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)  # which ends the thread

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in _SIGNALS:
                    self._receive(signal.Signals(number[0]))
                    self._is_answered.release()

    def _wait(self, number: int, frame: object) -> None:
        """Stops the main thread, which writes no more files where the program ends."""
        self._is_answered.acquire()

    def _receive(self, received: signal.Signals) -> None:
        if self._answer is None or self.received is not None:
            _stop_now(received)
        else:
            self.received = received
            _say(f"{received.name}: {self._answer}; again to stop now")
            if not self._is_alone:
                # JAX tells the other processes of a SIGTERM.
                os.kill(os.getpid(), signal.SIGTERM)


def _say(message: str) -> None:
    # Not through sys.stderr, which the main thread may be writing to. The line may
    # hold a progress bar.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def _stop_now(received: signal.Signals) -> NoReturn:
    for _ in range(5):
        files.discard_unfinished()
        time.sleep(0.02)  # another thread may be about to create one more
    _say(f"stopped by {received.name}")
    # Not by an exception: the main thread may not see it for minutes.
    os._exit(128 + received)
