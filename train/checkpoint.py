"""Checkpoints that can be trusted: asynchronous, whole or absent, checked on return."""

import functools
import inspect
import itertools
import json
import logging
import math
import pathlib
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

from train import best_checkpoint, damage, distributed, files
from train.config import BEST_OR_NEWEST, CheckpointChoice, CheckpointConfig
from train.run import CHECKPOINTS
from train.step import TrainState

DAMAGED_DIRECTORY = "damaged-checkpoints"
# In the name that Orbax gives a checkpoint while it is written.
_UNFINISHED = ".orbax-checkpoint-tmp"


class CheckpointError(Exception):
    """A checkpoint could not be written or none could be read; says what to do."""

    errno: int | None = None  # of the operating system, if it was the reason


class _UnreadableError(Exception):
    """A checkpoint that at least one process cannot read, and why."""

    def __init__(self, reason: str, *, is_damage: bool):
        super().__init__(reason)
        self.is_damage = is_damage


class Checkpoints:
    """The checkpoints of one run: parameters, optimizer, data iterator.

    Use it as a context, which waits for the last write at its end.
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
            # What a killed process left half-written.
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                # Before the checkpoint gets its name, and older ones are deleted.
                post_finalization_callback=lambda: damage.list_files(
                    directory / f"{self._writing}{_UNFINISHED}"
                )
            ),
        )
        self._writing: int | None = None
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
            if distributed.is_first():
                # Left where the disk is full.
                files.discard(self._directory, f"*{_UNFINISHED}*")

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
        sums = {"params": _checksums(params), "rest": _checksums(rest)}
        check = jax.tree.map(int, jax.device_get(sums))
        check["data"] = _digest(positions)
        check["shapes"] = {"params": _shapes(params), "rest": _shapes(rest)}
        check["check"] = _digest(check)
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
                    params=ocp.args.StandardSave(params),
                    rest=ocp.args.StandardSave(rest),
                    data=ocp.args.JsonSave({"positions": positions}),
                    check=ocp.args.JsonSave(check),
                ),
                metrics=metrics,
            )
        )

    def forget_losses(self) -> None:
        """Forgets the held-out losses of all checkpoints: they are of another text."""
        if distributed.is_first():
            for step in self.steps:
                directory = self._run_directory / CHECKPOINTS / str(step)
                if (metrics := directory / best_checkpoint.METRICS).exists():
                    shutil.rmtree(metrics)
        distributed.agree(True)  # all wait for the first one
        self._manager.reload()
        self._lowest_loss = self._manager.lowest_loss

    def wait(self) -> None:
        """Waits until all that was started is on disk.

        Raises:
          CheckpointError: it is not.
        """
        self._guard(self._wait)

    def _wait(self) -> None:
        self._manager.wait_until_finished()
        if distributed.is_first():
            files.sync(self._directory, recursive=False)

    def restore(
        self,
        abstract: TrainState,
        batches: grain.DatasetIterator,
        report: Callable[[str], None] = print,
    ) -> TrainState | None:
        """The newest checkpoint that all processes can read; None if there is none.

        Damaged ones that are newer are put aside and reported.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          batches: set to go on after the checkpoint's step.
          report: told about each damaged checkpoint.

        Raises:
          CheckpointError: there are checkpoints, and none of them is sound; or one
            cannot be read for a reason that is no damage, such as a lack of memory.
        """
        damaged = {}
        if distributed.is_first():
            self._manager.report_damaged_losses(report)
        seen = distributed.gather(self.steps)
        with _reader(self._directory) as reader:
            for step in sorted(set().union(*seen), reverse=True):
                try:
                    state, positions = self._read(reader, step, abstract)
                except _UnreadableError as error:
                    if not error.is_damage:
                        raise _not_read(
                            self._directory, step, error, is_damage=False
                        ) from error
                    damaged[step] = str(error)
                    continue
                with distributed.together(CheckpointError):
                    batches.set_state(_own_position(positions))
                    if distributed.is_first():
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
        """The state of a step, and the positions of all processes in the data."""
        params, rest = _parts(abstract)
        items = {"params": params, "rest": rest}
        directory = self._directory / str(step)
        check, data = _in_all(directory, lambda: _read_check(reader, step, items))
        arrays = _in_all(directory, lambda: _read_arrays(reader, step, items))
        # Sums are over the arrays of all processes, which wait for each other.
        _in_all(directory, lambda: _compare(arrays, check))
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
        except Exception as error:  # OSError, or whatever tensorstore makes of it
            good = f"step {self.steps[-1]}" if self.steps else "none"
            told = CheckpointError(
                f"could not write a checkpoint to {self._directory}: "
                f"{damage.explain(error, self._directory)}. The last good checkpoint: "
                f"{good}"
            )
            told.errno = damage.os_error_number(error)
            raise told from error


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
    with _reader(directory) as manager:
        steps, losses = manager.all_steps(), manager.eval_losses
        if not steps:
            raise CheckpointError(f"there are no checkpoints in {run_directory}")
        if choice.step is None and choice.which != "newest":
            manager.report_damaged_losses(report)
        for step in best_checkpoint.candidates(choice, steps, losses):
            items = {"params": abstract}
            try:
                check, _ = _read_check(manager, step, items)
                restored = _read_arrays(manager, step, items)
                _compare(restored, check)
            except Exception as error:
                found = damage.diagnose(error, directory / str(step))
                told = _not_read(directory, step, *found)
                if not found.is_damage:
                    raise told from error
                damaged[step] = str(told)
                continue
            for reason in damaged.values():
                report(f"{reason}; the one of step {step} is used")
            is_best = step == next(iter(losses), None)
            return Restored(step, losses.get(step), is_best, restored["params"])
    raise CheckpointError(next(iter(damaged.values())))


def _reader(directory: pathlib.Path) -> best_checkpoint.Manager:
    """Reads checkpoints without waiting for other processes, which may fail to."""
    own = jax.process_index()
    return best_checkpoint.Manager(
        directory,
        read_only=True,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own,
            active_processes={own},
            barrier_sync_key_prefix=f"process {own}",
        ),
    )


def _in_all(directory: pathlib.Path, action: Callable[[], Any]) -> Any:
    """Returns what an action returns if it fails in no process.

    Raises:
      _UnreadableError: it fails in one, for a reason that is no damage if there are
        such reasons.
    """
    result, found = None, None
    try:
        result = action()
    except Exception as error:  # there are as many kinds as kinds of damage
        found = damage.diagnose(error, directory)
    all_found = distributed.gather(found)
    failed = [(index, *found) for index, found in enumerate(all_found) if found]
    if not failed:
        return result
    index, reason, is_damage = min(failed, key=lambda each: each[2])
    if len(all_found) > 1:
        reason = f"process {index}: {reason}"
    raise _UnreadableError(reason, is_damage=is_damage)


def _not_read(
    directory: pathlib.Path, step: int, reason: Any, is_damage: bool
) -> CheckpointError:
    rest = "" if is_damage else ". It is not known to be damaged, and stays as it is"
    return CheckpointError(
        f"the checkpoint of step {step} in {directory} cannot be read: {reason}{rest}"
    )


def _read_check(
    reader: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of its arrays `items`, and where it was in the data.

    Raises:
      MisfitError: it holds arrays of other names, shapes or dtypes.
      Exception: it is damaged.
    """
    restored = reader.restore(
        step,
        args=ocp.args.Composite(
            check=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()
        ),
    )
    check, data = restored["check"], restored["data"]
    # Checkpoints of earlier versions lack the digest and the shapes.
    if "check" in check and check.pop("check") != _digest(check):
        raise damage.ContentError("check/metadata is not what was saved")
    if _digest(data["positions"]) != check["data"]:
        raise damage.ContentError("the data's position is not what was saved")
    for name, tree in items.items() if "shapes" in check else ():
        found, wanted = check["shapes"][name], _shapes(tree)
        for path in sorted(found.keys() | wanted.keys()):
            if found.get(path) != wanted.get(path):
                raise damage.MisfitError(
                    f"{path} is {found.get(path, 'absent')} in it, and "
                    f"{wanted.get(path, 'absent')} in this run: it is of another "
                    "version of the program, or of another run"
                )
    return check, data


def _read_arrays(
    reader: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> dict[str, Any]:
    """The arrays of a checkpoint; `items` has their shapes, dtypes and shardings."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    return dict(reader.restore(step, args=ocp.args.Composite(**args)).items())


def _shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


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


@functools.partial(jax.jit, static_argnames="whole")
def _checksums(tree: Any, whole: bool = True) -> dict[str, jax.Array]:
    """A number for each leaf, by path, that another content would hardly have.

    Computed where the leaves are, however they are sharded; it tells a flipped bit,
    which the compressed files do not.

    Args:
      tree: arrays.
      whole: False for the numbers of earlier versions, which left out the upper half
        of numbers of eight bytes.
    """

    def checksum(leaf):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        itemsize = leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * itemsize}")
        # Mixed one by one (with MurmurHash3's constants), each with its position: of a
        # plain sum two flipped signs, or two elements far apart, would cancel.
        mixed = bits.astype(jnp.uint32)
        if itemsize == 8 and whole:
            # Zeros count too, or the number would be that of an earlier version.
            upper = (bits >> 32).astype(jnp.uint32) + np.uint32(0x9E3779B9)
            mixed = mixed ^ _mix(upper)
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


def _compare(arrays: dict[str, Any], check: dict[str, Any]) -> None:
    """Raises a ContentError if an array is not what was saved."""
    for name, tree in arrays.items():
        unlike = _unlike(tree, check[name], whole=True)
        if unlike and _unlike(tree, check[name], whole=False):
            raise damage.ContentError(f"{unlike[0]} is not what was saved")


def _unlike(tree: Any, sums: dict[str, int], whole: bool) -> list[str]:
    """Paths of the leaves that have other checksums."""
    found = jax.device_get(_checksums(tree, whole))
    return [path for path, value in found.items() if sums.get(path) != int(value)]


def _digest(value: Any) -> int:
    """A checksum of what JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _own_position(positions: list[Any]) -> Any:
    """Where this process goes on, of as many as there were when it was saved."""
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    # Of files all processes read the same rows, each its share of a batch.
    if all(position == positions[0] for position in positions):
        return positions[0]
    raise CheckpointError(
        f"{len(positions)} processes shared the dataset, which {jax.process_count()} "
        "cannot go on with"
    )
