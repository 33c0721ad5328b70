"""Multi-process runs: connection, collective exchange of values, joint errors."""

import contextlib
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config.run_config import StartConfig

# JAX's error messages when the process of another host has exited.
_LOST = re.compile(r"(closed|reset) by peer|broken pipe|heartbeat", re.IGNORECASE)


@contextlib.contextmanager
def connected(start: StartConfig) -> Iterator[None]:
    """Connects this process to the others; call before JAX looks for devices.

    If the block fails, the process exits after at most ten seconds: the others may be
    waiting for it, and JAX stops them once it has exited.

    Raises:
      ValueError: the flags are incomplete, or the connection failed.
    """
    flags = (start.coordinator_address, start.num_processes, start.process_id)
    if any(flag is None for flag in flags) and any(flag is not None for flag in flags):
        raise ValueError(
            "--coordinator-address, --num-processes and --process-id must be given "
            "together or not at all"
        )
    try:
        jax.distributed.initialize(*flags)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot connect to the other processes: {str(error).rstrip('.')}. Check "
            "--coordinator-address, and that all processes are started"
        ) from error
    if jax.default_backend() == "cpu":
        # A training step from the cache waits forever for the other processes, if their
        # devices are CPUs (JAX 0.10.2). Before the first compilation: later is ignored.
        jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    except SystemExit as stop:
        if stop.code:
            _leave(stop.code)
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(str(error)):
            print(
                "error: another process of the run has ended, see its output; start "
                "all of them again to continue",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    # In a thread: shutdown waits for the others, which may have failed, too.
    parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    parting.start()
    parting.join(timeout=10)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_alone() -> bool:
    """Whether this is the only process."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the first process, which writes files and messages."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """Broadcasts the first process's value to all; waits until all have called."""
    if is_alone():
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def own_part(rows: int) -> slice:
    """Rows of a batch for this process."""
    share = rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def gather(value: Any) -> list[Any]:
    """Gathers the JSON values of all processes in each of them."""
    if is_alone():
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]


def share(value: Any) -> Any:
    """Broadcasts the first process's JSON value to all."""
    return gather(value)[0]


@contextlib.contextmanager
def together(kind: type[Exception]) -> Iterator[None]:
    """Raises an error in all processes if the block fails in one.

    The block must not contain collective calls.

    Args:
      kind: exception that the other processes raise, with the failed one's message.
    """
    error = None
    try:
        yield
    except (Exception, SystemExit) as raised:
        error = raised
    messages = gather(error and (_message(error) or type(error).__name__))
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message is not None:
            raise kind(f"process {index}: {message}")


def _message(error: BaseException) -> str:
    # A `console.Failure` has printed its message already.
    return getattr(error, "message", str(error))


@contextlib.contextmanager
def silence_all_but_first() -> Iterator[None]:
    """Discards the stdout of all processes but the first; stderr stays."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
        yield
        sys.stdout.flush()
