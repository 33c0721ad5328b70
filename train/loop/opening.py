"""Beginning of a run: directory, shared by all processes, settings, devices."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Protocol

import jax
from jax.sharding import Mesh

from train.config.run_config import RunConfig
from train.loop import hosts
from train.loop.journal import DivergedError
from train.rundir import disk_space, services
from train.rundir.checkpoints import CheckpointError, Checkpoints, quiet_orbax
from train.rundir.directory import Found, keep_settings, open_directory
from train.rundir.saved_config import CONFIG_FILE, save_config
from train.step import placement
from train.step.train_state import TrainState
from train.system import compilation_cache, console, out_of_memory, processes


def start(stack: contextlib.ExitStack, config: RunConfig) -> None:
    """Prepares a process: compilation cache, memory, output of one process only.

    Args:
      stack: keeps the other processes silent.
      config: the run.

    Raises:
      ValueError: the processes run different programs, or a package is missing.
    """
    compilation_cache.use(config.start)
    out_of_memory.trim_after_compilations()
    quiet_orbax()
    stack.enter_context(processes.silence_all_but_first())
    hosts.check_same_program(config)
    with processes.together(ValueError):
        services.check_packages(config)


def open_shared(stack: contextlib.ExitStack, config: RunConfig) -> Found | None:
    """Opens the directory of a run in the first process; see `open_directory`.

    Args:
      stack: keeps it locked.
      config: the run.

    Raises:
      ValueError, OSError: it cannot be used, or the processes see different files.
    """
    opened = None
    with processes.together(ValueError):
        if processes.is_first():
            opened = stack.enter_context(open_directory(config))
    shared = processes.share(opened)
    hosts.check_shared(config.output_dir)
    hosts.check_same_text(config)
    return None if shared is None else Found(*shared)


class _Tokenizer(Protocol):
    def save(self, directory: pathlib.Path) -> None: ...


def save_new(config: RunConfig, tokenizer: _Tokenizer) -> None:
    """Saves the config and the tokenizer of a new run; in the first process only."""
    # The config first: it marks the other files as this program's own.
    save_config(config, config.output_dir / CONFIG_FILE)
    tokenizer.save(config.output_dir)


def save_settings(config: RunConfig, found: Found | None, state: TrainState) -> None:
    """Checks the disk, and saves the settings of the run from this state on."""
    first = int(state.step)
    with processes.together(OSError):
        if processes.is_first():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            disk_space.check(config, first, size, console.warn)
            keep_settings(
                config,
                found.changes if found else {},
                first,
                evaluates_other_text=bool(found and found.has_other_evaluation),
            )


@contextlib.contextmanager
def training(config: RunConfig, mesh: Mesh) -> Iterator[Checkpoints]:
    """Sets the devices of a run and opens its checkpoints.

    Errors of the disk, the devices' memory and the loss end the program with one line.
    A ValueError is a bug from here on and shows a traceback.
    """
    with (
        jax.set_mesh(mesh),
        placement.rules(),
        console.user_errors(OSError, CheckpointError, DivergedError, MemoryError),
        out_of_memory.one_line_errors(),
        Checkpoints(config.output_dir, config.checkpoint) as checkpoints,
    ):
        yield checkpoints


def warn_once(message: str) -> None:
    """Prints a warning in the first process."""
    if processes.is_first():
        console.warn(message)
