"""Checkpoint reading with checksums, without waiting for other processes."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from train.config.run_config import BEST_OR_NEWEST, CheckpointChoice
from train.rundir import best_checkpoint, checksums, damage
from train.rundir.directory import CHECKPOINTS
from train.system import processes


class CheckpointError(Exception):
    """A checkpoint could not be written, or none could be read."""

    errno: int | None = None  # of the operating system, if that was the cause


class UnreadableError(Exception):
    """At least one process cannot read the checkpoint."""

    def __init__(self, reason: str, *, is_damage: bool):
        super().__init__(reason)
        self.is_damage = is_damage


class Restored(NamedTuple):
    """Parameters restored from a checkpoint, with its step and loss."""

    step: int
    eval_loss: float | None  # None: not evaluated
    is_best: bool  # lowest held-out loss of all checkpoints
    params: Any

    @property
    def description(self) -> str:
        """Step and held-out loss (if known) for messages."""
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
    """Restores the parameters from one of a run's checkpoints.

    Damaged checkpoints are reported and the next best choice is read, unless a step
    was chosen.

    Args:
      run_directory: the run's `--output-dir`.
      abstract: shapes, dtypes and shardings of the parameters.
      choice: which checkpoint.
      report: called for each damaged checkpoint.

    Raises:
      CheckpointError: there is no checkpoint, or all are damaged.
      ValueError: the chosen checkpoint does not exist.
    """
    directory = run_directory.absolute() / CHECKPOINTS
    if not directory.is_dir():
        raise CheckpointError(f"there are no checkpoints in {run_directory}")
    damaged = {}
    with open_reader(directory) as manager:
        steps, losses = manager.all_steps(), manager.eval_losses
        if not steps:
            raise CheckpointError(f"there are no checkpoints in {run_directory}")
        if choice.step is None and choice.which != "newest":
            manager.report_damaged_losses(report)
        for step in best_checkpoint.candidates(choice, steps, losses):
            items = {"params": abstract}
            try:
                check, _ = read_check(manager, step, items)
                restored = read_arrays(manager, step, items)
                checksums.compare(restored, check)
            except Exception as error:
                found = damage.diagnose(error, directory / str(step))
                unread = not_read(directory, step, *found)
                if not found.is_damage:
                    raise unread from error
                damaged[step] = str(unread)
                continue
            for reason in damaged.values():
                report(f"{reason}; the one of step {step} is used")
            is_best = step == next(iter(losses), None)
            return Restored(step, losses.get(step), is_best, restored["params"])
    raise CheckpointError(next(iter(damaged.values())))


def open_reader(directory: pathlib.Path) -> best_checkpoint.Manager:
    """Opens checkpoints for reading without barriers between processes."""
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


def in_all(directory: pathlib.Path, action: Callable[[], Any]) -> Any:
    """Runs an action in all processes; raises in all if it fails in one.

    Raises:
      UnreadableError: the action failed in a process. If some failures are not damage,
        one of those is reported.
    """
    result, found = None, None
    try:
        result = action()
    except Exception as error:  # damage causes all kinds of exceptions
        found = damage.diagnose(error, directory)
    all_found = processes.gather(found)
    failed = [(index, *found) for index, found in enumerate(all_found) if found]
    if not failed:
        return result
    index, reason, is_damage = min(failed, key=lambda each: each[2])
    if len(all_found) > 1:
        reason = f"process {index}: {reason}"
    raise UnreadableError(reason, is_damage=is_damage)


def not_read(
    directory: pathlib.Path, step: int, reason: Any, is_damage: bool
) -> CheckpointError:
    """Builds the error for a checkpoint that cannot be read."""
    rest = "" if is_damage else ". It is not known to be damaged, and stays as it is"
    return CheckpointError(
        f"the checkpoint of step {step} in {directory} cannot be read: {reason}{rest}"
    )


def check_of(items: dict[str, Any], positions: list[Any]) -> dict[str, Any]:
    """Computes checksums of arrays and data positions, and shapes of arrays."""
    sums = {name: checksums.of_arrays(tree) for name, tree in items.items()}
    check = jax.tree.map(int, jax.device_get(sums))
    check["data"] = checksums.digest(positions)
    check["shapes"] = {name: _shapes(tree) for name, tree in items.items()}
    return check | {"check": checksums.digest(check)}


def read_check(
    reader: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the checksums of a checkpoint's arrays, and its positions in the data.

    Raises:
      MisfitError: its arrays have other names, shapes or dtypes.
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
    if "check" in check and check.pop("check") != checksums.digest(check):
        raise damage.ContentError("check/metadata is not what was saved")
    if checksums.digest(data["positions"]) != check["data"]:
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


def read_arrays(
    reader: ocp.CheckpointManager, step: int, items: dict[str, Any]
) -> dict[str, Any]:
    """Reads the arrays of a checkpoint with the shapes and shardings of `items`."""
    args = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    return dict(reader.restore(step, args=ocp.args.Composite(**args)).items())


def _shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf by path, as text."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
