"""SIGTERM and Ctrl-C: a message at once, a stop after the current step.

Python runs signal handlers between two bytecodes of the main thread, which may be
minutes later during a compilation. So Python's wakeup descriptor writes the signal's
number to a pipe, and a thread reads it.
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
    """Context manager that delays SIGTERM and Ctrl-C until the step is finished.

    A second signal exits at once and removes temporary files, with exit code 130 for
    Ctrl-C and 143 for SIGTERM.

    Args:
      answer: message on stderr after the first signal. None: the first signal exits
        at once.

    Attributes:
      received: the first signal, or None. The loop calls `reached` after each step
        and, if it returns True, saves and ends.
    """

    def __init__(self, answer: str | None = None):
        self.received: signal.Signals | None = None
        self._answer = answer
        self._before = {}
        self._is_alone = True
        self._is_answered = threading.Semaphore(0)

    @property
    def exit_code(self) -> int:
        """Exit code after a saved stop: 130 for Ctrl-C, 0 for a scheduler's SIGTERM."""
        return 130 if self.received == signal.SIGINT else 0

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, the same one in all processes."""
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
        # Among several processes JAX handles SIGTERM and notifies the others.
        for number in _SIGNALS if self._is_alone else (signal.SIGINT,):
            # Background processes ignore SIGINT; that must not change.
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
        """Blocks the main thread, so that it creates no files while exiting."""
        self._is_answered.acquire()

    def _receive(self, received: signal.Signals) -> None:
        if self._answer is None or self.received is not None:
            _stop_now(received)
        else:
            self.received = received
            _say(f"{received.name}: {self._answer}; again to stop now")
            if not self._is_alone:
                # JAX passes a SIGTERM on to the other processes.
                os.kill(os.getpid(), signal.SIGTERM)


def _say(message: str) -> None:
    # Not through sys.stderr, which the main thread may be writing to. The leading
    # line break ends a progress bar.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def _stop_now(received: signal.Signals) -> NoReturn:
    for _ in range(5):
        files.discard_unfinished()
        time.sleep(0.02)  # another thread may be creating one more
    _say(f"stopped by {received.name}")
    # Not an exception, which the main thread may only see minutes later.
    os._exit(128 + received)
