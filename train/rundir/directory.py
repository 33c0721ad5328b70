"""Run directory: lock, saved config, check on resume."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import filelock

from train.config.rules import flag
from train.config.run_config import RunConfig
from train.rundir import changes, identity
from train.rundir.changes import Changes
from train.rundir.saved_config import CONFIG_FILE, load_config, save_config

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
CHECKPOINT_NOTE = ".has-checkpoints"
# Files of a run other than its config.
OWN_FILES = (
    *(*identity.TOKENIZER_FILES, identity.IDENTITY_FILE, changes.HISTORY_FILE),
    *(METRICS_FILE, "curve.png", "diagnostics.jsonl", "subspace.png"),
    *(CHECKPOINTS, "wandb-id.txt"),
)


class Found(NamedTuple):
    """Existing run to resume, with its changed settings.

    Attributes:
      changes: permitted differences from the saved settings.
      has_other_rows: whether to read the training text from its beginning.
      has_other_evaluation: whether earlier held-out losses are not comparable.
    """

    changes: Changes
    has_other_rows: bool
    has_other_evaluation: bool = False


@contextlib.contextmanager
def open_directory(config: RunConfig) -> Iterator[Found | None]:
    """Opens and locks the directory of a new or a resumed run.

    Yields:
      The run to resume; None for a new run, also if the directory's run has not taken
      a step (its checkpoint before training is then removed).

    Raises:
      ValueError: the directory's run cannot continue with this config, is running, or
        has lost a file; or files would be overwritten; or --resume found no run.
      OSError: the directory cannot be created, read or written.
    """
    directory = config.output_dir
    allowed = changes.allowed_names(config.start.allow_changes, config)
    check_owned(directory, CONFIG_FILE, OWN_FILES)
    if config.start.resume and not (directory / CONFIG_FILE).exists():
        raise ValueError(
            f"--resume: there is no run in --output-dir {directory}; without --resume "
            "one is started there"
        )
    with lock_directory(directory):
        saved = directory / CONFIG_FILE
        try:
            before = load_config(type(config), saved) if saved.exists() else None
        except ValueError as error:
            raise ValueError(
                f"--output-dir {directory} has another config.json than a run writes: "
                f"{error}. Give another directory, or put the run's own back"
            ) from error
        if before is not None and _has_begun(directory):
            found = _check_changes(config, before, allowed)
        else:
            _remove_start(directory)
            found = None
        yield found


def _has_begun(directory: pathlib.Path) -> bool:
    """Whether a run has taken a step; a run without one may be overwritten.

    Raises:
      ValueError: its checkpoints are missing.
    """
    metrics, checkpoints = directory / METRICS_FILE, directory / CHECKPOINTS
    rows = metrics.read_bytes() if metrics.exists() else b""
    steps = saved_steps(directory)
    if any(steps):
        return True
    # The directory of checkpoints is created before the first row is written.
    is_lost = bool(rows) and not checkpoints.exists()
    if not steps and (is_lost or (directory / CHECKPOINT_NOTE).exists()):
        raise ValueError(
            f"the checkpoints of the run in --output-dir {directory} are gone: put "
            f"{checkpoints} back to continue it, or give another directory to start "
            "over"
        )
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        return bool(rows) and json.loads(rows).get("step") != 0
    return True


def _remove_start(directory: pathlib.Path) -> None:
    """Removes the checkpoint of step 0, which may belong to another config."""
    (directory / CHECKPOINT_NOTE).unlink(missing_ok=True)
    for path in (directory / CHECKPOINTS).glob("*"):
        if path.name.split(".")[0] == "0":
            shutil.rmtree(path)


def _check_changes(config: RunConfig, before: RunConfig, allowed: list[str]) -> Found:
    """Compares a run with the config that resumes it; raises a ValueError."""
    directory = config.output_dir
    identity.check_tokenizer(directory)
    newest = max(saved_steps(directory), default=0)
    if newest > config.steps:
        raise ValueError(
            f"--steps {config.steps}: the run in --output-dir {directory} has a "
            f"checkpoint of step {newest} already; give as many to continue it, or "
            "another directory to start another"
        )
    found = changes.find(config, before)
    try:
        same, other = identity.compare_text(config.data, directory)
    except ValueError as error:
        raise ValueError(
            f"{error}. If the text has moved, give its new place: the run in "
            f"{directory} continues with it"
        ) from error
    for name, difference in other.items():
        value = changes.flat_values(dataclasses.asdict(config))[name]
        if name not in found and name not in allowed:
            raise ValueError(
                f"{flag(name)} {value} has other files than the run in {directory} "
                f"began with: {difference}. Put them back, or give --allow-changes "
                f"{','.join([*allowed, name])} to continue on them as they are"
            )
        found[name] = (found.get(name, (value,))[0], f"{value} ({difference})")
    tokenizer = "data.tokenizer"
    if tokenizer in found and identity.is_own_tokenizer(
        config.data, config.init_from, directory
    ):
        same.append(tokenizer)
    of_state = []
    if any(name.startswith("optimizer.") for name in found):
        from train.rundir.state_changes import settings_of_state  # slow to import

        of_state = settings_of_state(config, before)
    try:
        changes.check(found, allowed, same, of_state)
    except ValueError as error:
        message = f"--output-dir {directory} holds another run: {error}"
        raise ValueError(message) from error
    others = {name: found[name] for name in found if name not in same}
    return Found(
        found,
        changes.reads_other_rows(others),
        changes.evaluates_other_text(
            others, has_own_files=config.data.has_own_evaluation
        ),
    )


def check_owned(
    directory: pathlib.Path, config_file: str, names: Sequence[str]
) -> None:
    """Raises a ValueError if a program would overwrite files of another one.

    Args:
      directory: the program's output directory.
      config_file: file that marks the directory as the program's own.
      names: files that the program writes.
    """
    if (directory / config_file).exists():
        return
    paths = [directory / name for name in names]
    full = [path for path in paths if path.is_file() or any(path.glob("*"))]
    if found := [path.name for path in full]:
        raise ValueError(
            f"--output-dir {directory} has no {config_file} of this program, but "
            f"{', '.join(found)}, which it would overwrite: give another directory, or "
            f"put {config_file} back if it is lost"
        )


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in a run's directory."""
    names = (path.name for path in (directory / CHECKPOINTS).glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())


def note_checkpoint(directory: pathlib.Path) -> bool:
    """Marks a run that has a checkpoint; returns whether it is marked.

    The mark distinguishes a run whose checkpoints were deleted from one that was
    stopped before its first checkpoint and may start over.
    """
    path = directory / CHECKPOINT_NOTE
    if not path.exists() and saved_steps(directory):
        path.touch()
    return path.exists()


def keep_settings(
    config: RunConfig,
    found: Changes,
    step: int,
    *,
    evaluates_other_text: bool = False,
) -> None:
    """Saves the settings of a run from a step on: history, file checksums, config.

    Raises:
      ValueError: the text cannot be found.
      OSError: a file cannot be read or written.
    """
    changes.append_history(
        config.output_dir, found, step, evaluates_other_text=evaluates_other_text
    )
    # The config last: after an interruption the same command finds the old one.
    identity.save(config.data, config.output_dir)
    save_config(config, config.output_dir / CONFIG_FILE)


@contextlib.contextmanager
def lock_directory(directory: pathlib.Path) -> Iterator[None]:
    """Creates a directory and locks it against other processes.

    Raises:
      ValueError: another process holds the lock.
      OSError: the directory cannot be created or written.
    """
    lock = filelock.FileLock(directory / LOCK_FILE, blocking=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except filelock.Timeout as error:
        raise ValueError(
            f"a run in --output-dir {directory} is going on: wait for it or give "
            "another directory"
        ) from error
    except OSError as error:
        raise OSError(f"cannot write to --output-dir {directory}: {error}") from error
    with held:
        yield
