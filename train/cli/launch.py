"""Start of a training program: output, other processes, configuration."""

import io
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from train.system import cluster, console

Config = TypeVar("Config")


def launch(
    argv: Sequence[str] | None,
    read: Callable[[Sequence[str]], Config],
    run: Callable[[Config], int],
) -> None:
    """Runs a program, in each of several processes, and exits with its code.

    Args:
      argv: the arguments; None: those of the command line.
      read: parses them.
      run: the program; returns its exit code.
    """
    # errors="replace": samples may contain characters that the terminal cannot encode.
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line buffering: a second Ctrl-C exits without flushing.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    argv = sys.argv[1:] if argv is None else argv
    start = cluster.find_processes(argv)
    if start is None:
        sys.exit(run(read(argv)))
    from train.system import processes

    # Connect first, so that an error in one process reaches the others.
    with console.user_errors(ValueError), processes.connected(start):
        with console.user_errors(ValueError), processes.together(ValueError):
            config = read(argv)
        sys.exit(run(config))
