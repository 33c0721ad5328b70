"""Several processes that train one model: finding and agreeing with each other."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config import StartConfig


def initialize(config: StartConfig) -> None:
    """Connects this process to the others, if there are any.

    They are told by flags, or found in the environment of Slurm (`srun`), Open MPI, or
    a TPU slice of several hosts. Once, before JAX looks for devices.

    Raises:
      ValueError: the flags are incomplete, or the others are not reached.
    """
    flags = (config.coordinator_address, config.num_processes, config.process_id)
    is_wanted = config.distributed or _in_a_cluster()
    if all(flag is None for flag in flags) and not is_wanted:
        return
    if any(flag is None for flag in flags) and any(flag is not None for flag in flags):
        raise ValueError(
            "--coordinator-address, --num-processes and --process-id are given "
            "together or not at all"
        )
    try:
        jax.distributed.initialize(*flags)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot connect to the other processes: {error}. Check "
            "--coordinator-address, and that all processes are started"
        ) from error


def _in_a_cluster() -> bool:
    sizes = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(os.environ.get(name) or 1) > 1 for name in sizes)
    return several or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """What the first process says, in all of them; waits until all ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in each of them."""
    if jax.process_count() == 1:
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
    """The JSON value that the first process has, in all of them."""
    return gather(value)[0]


@contextlib.contextmanager
def together(kind: type[Exception]) -> Iterator[None]:
    """Ends the block in all processes if it fails in one, instead of waiting for it.

    No process may wait for another within the block.

    Args:
      kind: what the others raise, with the message of the one that failed.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages = gather(error and (str(error) or type(error).__name__))
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message is not None:
            raise kind(f"process {index}: {message}")


@contextlib.contextmanager
def silence_all_but_first() -> Iterator[None]:
    """Lets only the first process write to stdout; errors are every process' own."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
        yield
        sys.stdout.flush()
