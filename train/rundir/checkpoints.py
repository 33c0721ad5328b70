"""Checkpoints of a run: asynchronous atomic writes, checksums, restore."""

import inspect
import itertools
import logging
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.config.run_config import CheckpointConfig
from train.rundir import best_checkpoint, checksums, damage
from train.rundir import checkpoint_reading as reading
from train.rundir.checkpoint_reading import CheckpointError, UnreadableError
from train.rundir.directory import CHECKPOINTS
from train.step.train_state import TrainState
from train.system import files, processes

DAMAGED_DIRECTORY = "damaged-checkpoints"
# Part of the name that Orbax gives an unfinished checkpoint.
_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """Checkpoint manager of a run: parameters, optimizer state, data iterator.

    A context manager that waits for the last write when it exits.
    """

    def __init__(self, run_directory: pathlib.Path, config: CheckpointConfig):
        self._run_directory = run_directory.absolute()
        self._directory = directory = self._run_directory / CHECKPOINTS
        files.discard_at_once(directory, f"*{_UNFINISHED}*")
        self._keep_best = config.keep_best
        keep = [checkpoint_managers.LatestN(config.keep_last_checkpoints)]
        if config.keep_checkpoint_every_steps:
            every = config.keep_checkpoint_every_steps
            keep.append(checkpoint_managers.EveryNSteps(every))
        if config.keep_best:
            keep.append(best_checkpoint.KEEP_BEST)
        self._manager = best_checkpoint.Manager(
            directory,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            # Unfinished ones are left by killed processes.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                # Called before the rename, and before older ones are deleted.
                post_finalization_callback=lambda: damage.list_files(
                    directory / f"{self._writing}{_UNFINISHED}"
                )
            ),
        )
        self._writing: int | None = None
        # Those with a damaged loss are kept, because one may be the best.
        damaged = self._manager.with_damaged_loss
        keep.append(checkpoint_managers.CustomSteps(damaged))
        self._lowest_loss = self._manager.lowest_loss

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._manager.close()
            if processes.is_first():
                # A full disk leaves unfinished checkpoints.
                files.discard(self._directory, f"*{_UNFINISHED}*")

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def is_best(self, eval_loss: float | None) -> bool:
        """Whether a held-out loss is lower than those of all checkpoints.

        False for None, or if the best checkpoint is not kept.
        """
        if eval_loss is None or not self._keep_best:
            return False
        return processes.agree(eval_loss < self._lowest_loss)

    def save(
        self,
        step: int,
        state: TrainState,
        batches: grain.DatasetIterator,
        eval_loss: float | None = None,
    ) -> None:
        """Starts an asynchronous write; returns once the state may be overwritten.

        Args:
          step: number of steps taken.
          state: the training state.
          batches: the data's iterator.
          eval_loss: the state's held-out loss, if it was evaluated.

        Raises:
          CheckpointError: this or the previous write failed.
        """
        if step in self._manager.all_steps():
            return
        items = _items(state)
        positions = processes.gather(batches.get_state())
        check = reading.check_of(items, positions)
        metrics = None
        if eval_loss is not None and math.isfinite(eval_loss):
            metrics = best_checkpoint.metrics_of(eval_loss, step)
            self._lowest_loss = min(self._lowest_loss, eval_loss)
        self.wait()
        self._writing = step
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(items["params"]),
                    rest=ocp.args.StandardSave(items["rest"]),
                    data=ocp.args.JsonSave({"positions": positions}),
                    check=ocp.args.JsonSave(check),
                ),
                metrics=metrics,
            )
        )

    def forget_losses(self) -> None:
        """Deletes the held-out losses of all checkpoints, after the text changed."""
        if processes.is_first():
            for step in self.steps:
                directory = self._run_directory / CHECKPOINTS / str(step)
                if (metrics := directory / best_checkpoint.METRICS).exists():
                    shutil.rmtree(metrics)
        processes.agree(True)  # a barrier: all wait for the first process
        self._manager.reload()
        self._lowest_loss = self._manager.lowest_loss

    def wait(self) -> None:
        """Waits until all writes are on disk.

        Raises:
          CheckpointError: a write failed.
        """
        self._guard(self._wait)

    def _wait(self) -> None:
        self._manager.wait_until_finished()
        if processes.is_first():
            files.sync(self._directory, recursive=False)

    def restore(
        self,
        abstract: TrainState,
        batches: grain.DatasetIterator,
        report: Callable[[str], None] = print,
    ) -> TrainState | None:
        """Restores the newest checkpoint that all processes can read, or None.

        Newer damaged ones are reported and moved to `DAMAGED_DIRECTORY`.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          batches: the data's iterator, set to the checkpoint's position.
          report: called for each damaged checkpoint.

        Raises:
          CheckpointError: all checkpoints are damaged; or one cannot be read for
            another reason, such as a lack of memory.
        """
        damaged = {}
        if processes.is_first():
            self._manager.report_damaged_losses(report)
        seen = processes.gather(self.steps)
        with reading.open_reader(self._directory) as reader:
            for step in sorted(set().union(*seen), reverse=True):
                try:
                    state, positions = self._read(reader, step, abstract)
                except UnreadableError as error:
                    if not error.is_damage:
                        raise reading.not_read(
                            self._directory, step, error, is_damage=False
                        ) from error
                    damaged[step] = str(error)
                    continue
                with processes.together(CheckpointError):
                    batches.set_state(_own_position(positions))
                    if processes.is_first():
                        self._put_aside(damaged, step, report)
                self._manager.reload()
                self._lowest_loss = self._manager.lowest_loss
                return state
        if damaged:
            newest = max(damaged)
            raise CheckpointError(
                f"no checkpoint in {self._directory} can be read; of step {newest}: "
                f"{damaged[newest]}. To start over give another --output-dir"
            )
        return None

    def _read(
        self, reader: ocp.CheckpointManager, step: int, abstract: TrainState
    ) -> tuple[TrainState, list[Any]]:
        """Reads the state of a step, and the positions of all processes in the data."""
        items = _items(abstract)
        directory = self._directory / str(step)
        check, data = reading.in_all(
            directory, lambda: reading.read_check(reader, step, items)
        )
        arrays = reading.in_all(
            directory, lambda: reading.read_arrays(reader, step, items)
        )
        # Checksums of global arrays are collective, so all processes compute them.
        reading.in_all(directory, lambda: checksums.compare(arrays, check))
        return TrainState(params=arrays["params"], **arrays["rest"]), data["positions"]

    def _put_aside(
        self, damaged: dict[int, str], used: int, report: Callable[[str], None]
    ) -> None:
        for step, reason in damaged.items():
            target = self._run_directory / DAMAGED_DIRECTORY / str(step)
            for number in itertools.count(2):
                if not target.exists():
                    break
                target = target.with_name(f"{step}-{number}")
            target.parent.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(target)
            report(
                f"the checkpoint of step {step} is damaged ({reason}); it is now in "
                f"{target}, and the one of step {used} is used"
            )

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # OSError, or TensorStore's translation of it
            good = f"step {self.steps[-1]}" if self.steps else "none"
            failure = CheckpointError(
                f"could not write a checkpoint to {self._directory}: "
                f"{damage.explain(error, self._directory)}. The last good checkpoint: "
                f"{good}"
            )
            failure.errno = damage.os_error_number(error)
            raise failure from error


def quiet_orbax() -> None:
    """Silences Orbax's logs and late errors; exceptions are still raised.

    Orbax logs errors with tracebacks. At the first one it closes its event loop, and
    every array and coroutine that is still pending then causes another error.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(report):
        is_late = str(report.exc_value) == "Event loop is closed"
        if not is_late and not inspect.iscoroutine(report.object):
            show(report)

    sys.unraisablehook = hook


def _items(state: TrainState) -> dict[str, Any]:
    rest = state._asdict()
    return {"params": rest.pop("params"), "rest": rest}


def _own_position(positions: list[Any]) -> Any:
    """Chooses this process's position from those of the processes that saved."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    # Local files have one position for all: each process takes a share of each batch.
    if all(position == positions[0] for position in positions):
        return positions[0]
    raise CheckpointError(
        f"{len(positions)} processes shared the dataset, which {jax.process_count()} "
        "cannot go on with"
    )
