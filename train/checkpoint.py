"""Checkpoints that can be trusted: asynchronous, whole or absent, checked on return."""

import inspect
import json
import logging
import math
import pathlib
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train import best_checkpoint, distributed, files
from train.config import BEST_OR_NEWEST, CheckpointChoice, CheckpointConfig
from train.run import CHECKPOINTS
from train.step import TrainState

DAMAGED_DIRECTORY = "damaged-checkpoints"
# In the name that Orbax gives a checkpoint while it is written.
_UNFINISHED = ".orbax-checkpoint-tmp"


class CheckpointError(Exception):
    """A checkpoint could not be written or none could be read; says what to do."""


class Checkpoints:
    """The checkpoints of one run: parameters, optimizer, data iterator.

    Use it as a context, which waits for the last write at its end.
    """

    def __init__(self, run_directory: pathlib.Path, config: CheckpointConfig):
        self._run_directory = run_directory.absolute()
        directory = self._run_directory / CHECKPOINTS
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
            # What a killed process left half-written.
            cleanup_tmp_directories=True,
        )
        # One of them may be the best.
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

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def is_best(self, eval_loss: float | None) -> bool:
        """Whether a state of this held-out loss, if it has one, is to be kept.

        That is if the loss is lower than those of all checkpoints.
        """
        if eval_loss is None or not self._keep_best:
            return False
        return distributed.agree(eval_loss < self._lowest_loss)

    def save(
        self,
        step: int,
        state: TrainState,
        batches: grain.DatasetIterator,
        eval_loss: float | None = None,
    ) -> None:
        """Starts writing; returns once the state may change again.

        Args:
          step: the step after which the state is as it is.
          state: all that a step changes.
          batches: the data's iterator.
          eval_loss: the state's held-out loss, if it was evaluated.

        Raises:
          CheckpointError: this or the write before did not work out.
        """
        if step in self._manager.all_steps():
            return
        params, rest = _parts(state)
        positions = distributed.gather(batches.get_state())
        check = {
            "params": jax.device_get(_checksums(params)),
            "rest": jax.device_get(_checksums(rest)),
            "data": _digest(positions),
        }
        metrics = None
        if eval_loss is not None and math.isfinite(eval_loss):
            metrics = best_checkpoint.metrics_of(eval_loss, step)
            self._lowest_loss = min(self._lowest_loss, eval_loss)
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    rest=ocp.args.StandardSave(rest),
                    data=ocp.args.JsonSave({"positions": positions}),
                    check=ocp.args.JsonSave(jax.tree.map(int, check)),
                ),
                metrics=metrics,
            )
        )

    def wait(self) -> None:
        """Waits until all that was started is on disk.

        Raises:
          CheckpointError: it is not.
        """
        self._guard(self._manager.wait_until_finished)

    def restore(
        self,
        abstract: TrainState,
        batches: grain.DatasetIterator,
        report: Callable[[str], None] = print,
    ) -> TrainState | None:
        """The newest checkpoint that is sound; None if there is no checkpoint.

        Damaged ones that are newer are put aside and reported.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          batches: set to go on after the checkpoint's step.
          report: told about each damaged checkpoint.

        Raises:
          CheckpointError: there are checkpoints, and none of them is sound.
        """
        damaged = {}
        if distributed.is_first():
            self._manager.report_damaged_losses(report)
        for step in reversed(self.steps):
            try:
                state = self._read(step, abstract, batches)
            except Exception as error:  # there are as many kinds as kinds of damage
                damaged[step] = _first_line(error)
                continue
            if distributed.is_first():
                for broken, reason in damaged.items():
                    aside = self._put_aside(broken)
                    report(
                        f"the checkpoint of step {broken} is damaged ({reason}); it is "
                        f"now in {aside}, and the one of step {step} is used"
                    )
            distributed.agree(True)  # all wait for what the first one moves
            self._manager.reload()
            self._lowest_loss = self._manager.lowest_loss
            return state
        if damaged:
            newest = max(damaged)
            raise CheckpointError(
                f"no checkpoint in {self._run_directory / CHECKPOINTS} can be read; of "
                f"step {newest}: {damaged[newest]}. To start over give another "
                "--output-dir"
            )
        return None

    def _read(
        self, step: int, abstract: TrainState, batches: grain.DatasetIterator
    ) -> TrainState:
        params, rest = _parts(abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                rest=ocp.args.StandardRestore(rest),
                check=ocp.args.JsonRestore(),
                data=ocp.args.JsonRestore(),
            ),
        )
        for name in ("params", "rest"):
            _compare(restored[name], restored["check"][name])
        positions = restored["data"]["positions"]
        if _digest(positions) != restored["check"]["data"]:
            raise ValueError("the data's position is not what was saved")
        batches.set_state(_own_position(positions))
        return TrainState(params=restored["params"], **restored["rest"])

    def _put_aside(self, step: int) -> pathlib.Path:
        source = self._run_directory / CHECKPOINTS / str(step)
        target = self._run_directory / DAMAGED_DIRECTORY / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return target

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # OSError, or whatever tensorstore makes of it
            good = f"step {self.steps[-1]}" if self.steps else "none"
            raise CheckpointError(
                "could not write a checkpoint to "
                f"{self._run_directory / CHECKPOINTS}: "
                f"{_first_line(error)}. The last good checkpoint: {good}"
            ) from error


class Restored(NamedTuple):
    """Parameters and where they are from."""

    step: int
    eval_loss: float | None  # None: it was not evaluated
    is_best: bool  # whether no checkpoint has a lower held-out loss
    params: Any

    @property
    def description(self) -> str:
        """The step, and the held-out loss if it is known, in words."""
        if self.eval_loss is None:
            return f"step {self.step:,}"
        best = ", the best" if self.is_best else ""
        return f"step {self.step:,}, held-out loss {self.eval_loss:.3f}{best}"


def restore_params(
    run_directory: pathlib.Path,
    abstract: Any,
    choice: CheckpointChoice = BEST_OR_NEWEST,
    report: Callable[[str], None] = print,
) -> Restored:
    """The parameters of one of a run's checkpoints, without the rest of it.

    Damaged checkpoints are reported, and the one is read that would have been chosen
    without them, unless the choice is a certain step.

    Args:
      run_directory: the run's `--output-dir`.
      abstract: their shapes, dtypes and shardings.
      choice: which checkpoint.
      report: told about each damaged checkpoint that was to be read.

    Raises:
      CheckpointError: there is no checkpoint, or none that is sound.
      ValueError: there is not the one that was chosen.
    """
    directory = run_directory.absolute() / CHECKPOINTS
    if not directory.is_dir():
        raise CheckpointError(f"there are no checkpoints in {run_directory}")
    damaged = {}
    with best_checkpoint.Manager(directory, read_only=True) as manager:
        steps, losses = manager.all_steps(), manager.eval_losses
        if not steps:
            raise CheckpointError(f"there are no checkpoints in {run_directory}")
        if choice.step is None and choice.which != "newest":
            manager.report_damaged_losses(report)
        for step in best_checkpoint.candidates(choice, steps, losses):
            try:
                restored = manager.restore(
                    step,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(abstract),
                        check=ocp.args.JsonRestore(),
                    ),
                )
                _compare(restored["params"], restored["check"]["params"])
            except Exception as error:
                damaged[step] = (
                    f"the checkpoint of step {step} in {directory} cannot be read: "
                    f"{_first_line(error)}"
                )
                continue
            for reason in damaged.values():
                report(f"{reason}; the one of step {step} is used")
            is_best = step == next(iter(losses), None)
            return Restored(step, losses.get(step), is_best, restored["params"])
    raise CheckpointError(next(iter(damaged.values())))


def quiet_orbax() -> None:
    """Keeps Orbax' own reports from the user's terminal; errors still arrive here.

    It logs them with their tracebacks. It also closes its event loop at the first
    one; each array that tensorstore finishes after that, and each coroutine that
    nobody waits for any longer, ends in another.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(report):
        is_late = str(report.exc_value) == "Event loop is closed"
        if not is_late and not inspect.iscoroutine(report.object):
            show(report)

    sys.unraisablehook = hook


def _parts(state: TrainState) -> tuple[Any, dict[str, Any]]:
    rest = state._asdict()
    return rest.pop("params"), rest


@jax.jit
def _checksums(tree: Any) -> dict[str, jax.Array]:
    """A number for each leaf, by path, that another content would hardly have.

    Computed where the leaves are, however they are sharded; it tells a flipped bit,
    which the compressed files do not.
    """

    def checksum(leaf):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{leaf.dtype.itemsize * 8}")
        # Mixed one by one (with MurmurHash3's constants), each with its position: of a
        # plain sum two flipped signs, or two elements far apart, would cancel.
        mixed = bits.astype(jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            mixed = _mix(mixed + index * np.uint32(2_654_435_761) + np.uint32(size))
        return jnp.sum(mixed, dtype=jnp.uint32)

    return {
        jax.tree_util.keystr(path): checksum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _compare(tree: Any, expected: dict[str, int]) -> None:
    found = jax.tree.map(int, jax.device_get(_checksums(tree)))
    for path, value in found.items():
        if expected.get(path) != value:
            raise ValueError(f"{path} is not what was saved")


def _digest(positions: list[Any]) -> int:
    """A number for where the iterators of all processes are."""
    return zlib.crc32(json.dumps(positions, sort_keys=True).encode())


def _own_position(positions: list[Any]) -> Any:
    """Where this process goes on, of as many as there were when it was saved."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    # Of files all processes read the same rows, each its share of a batch.
    if all(position == positions[0] for position in positions):
        return positions[0]
    raise ValueError(
        f"{len(positions)} processes shared the dataset, which {jax.process_count()} "
        "cannot go on with"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    if len(line) < 200:
        return line
    # Tensorstore wraps the reason in one path after another, and its whole request.
    reason = re.search(r"([^:]+?) \[os_error_code", text)
    return reason[1].strip() if reason else "..." + line[-200:]
