"""Run directory: lock, saved config, check on resume."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import filelock
import pydantic

from train.config.optimizer_config import migrated
from train.config.rules import flag
from train.config.run_config import PretrainConfig
from train.rundir import changes, identity
from train.rundir.changes import Changes
from train.system.files import write_whole

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
CHECKPOINT_NOTE = ".has-checkpoints"
# Files that a run writes into its directory, apart from its config.
OWN_FILES = (
    *(*identity.TOKENIZER_FILES, identity.IDENTITY_FILE, changes.HISTORY_FILE),
    *(METRICS_FILE, "curve.png", "diagnostics.jsonl", "subspace.png"),
    *(CHECKPOINTS, "wandb-id.txt"),
)
# Settings that each version has saved.
ALWAYS_SAVED = frozenset(
    f"{group}{name}"
    for group, names in {
        "": "steps seed",
        "data.": "data_glob held_out_fraction sequence_length_tokens "
        "batch_size_sequences",
        "optimizer.": "name learning_rate warmup_fraction rank update_interval scale "
        "final_learning_rate_fraction growth_limit step_size eps weight_decay "
        "max_gradient_norm",
    }.items()
    for name in names.split()
)

Config = TypeVar("Config")


class Found(NamedTuple):
    """A run to be continued.

    Attributes:
      changes: settings that differ from those it has been run with, and may.
      has_other_rows: whether the training text is to be read from its beginning.
      has_other_evaluation: whether held-out losses are of another text than before.
    """

    changes: Changes
    has_other_rows: bool
    has_other_evaluation: bool = False


@contextlib.contextmanager
def open_directory(config: PretrainConfig) -> Iterator[Found | None]:
    """Takes `config.output_dir` for a run, for as long as the context lasts.

    Nothing of a run that has begun to train is touched.

    Yields:
      The run that it holds, which is then to be continued; None if it holds none, or
      one that has not begun, of which a checkpoint before training is removed.

    Raises:
      ValueError: it holds a run that cannot be continued with this config, one that
        is running, one that has lost a file, or files that a run would overwrite; or
        no run where one was to be resumed.
      OSError: it cannot be created, read or written.
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
            before = load_config(PretrainConfig, saved) if saved.exists() else None
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
    """Whether a run has taken a step; one that has not may be overwritten.

    Raises:
      ValueError: it has lost its checkpoints.
    """
    metrics, checkpoints = directory / METRICS_FILE, directory / CHECKPOINTS
    rows = metrics.read_bytes() if metrics.exists() else b""
    steps = saved_steps(directory)
    if any(steps):
        return True
    # The directory is older than the first row.
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
    """Removes the checkpoint before training, which another config may have made."""
    (directory / CHECKPOINT_NOTE).unlink(missing_ok=True)
    for path in (directory / CHECKPOINTS).glob("*"):
        if path.name.split(".")[0] == "0":
            shutil.rmtree(path)


def _check_changes(
    config: PretrainConfig, before: PretrainConfig, allowed: list[str]
) -> Found:
    """Compares a run with the config that is to continue it; raises a ValueError."""
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
        from train.loop.continuation import settings_of_state  # slow to import

        of_state = settings_of_state(config, before)
    try:
        changes.check(found, allowed, same, of_state)
    except ValueError as error:
        message = f"--output-dir {directory} holds another run: {error}"
        raise ValueError(message) from error
    others = {name: found[name] for name in found if name not in same}
    has_eval_glob = config.data.eval_glob is not None
    return Found(
        found,
        changes.reads_other_rows(others),
        changes.evaluates_other_text(others, has_eval_glob=has_eval_glob),
    )


def check_owned(
    directory: pathlib.Path, config_file: str, names: Sequence[str]
) -> None:
    """Raises a ValueError if files would be overwritten that may be somebody else's.

    Args:
      directory: where a program wants to write.
      config_file: with this file in it the directory is the program's own.
      names: what the program writes there.
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
    """The steps of the checkpoints in the directory of a run that are complete."""
    names = (path.name for path in (directory / CHECKPOINTS).glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())


def note_checkpoint(directory: pathlib.Path) -> bool:
    """Notes that a run has a checkpoint, if it has; returns whether that is noted.

    Without the note nothing would tell a run whose checkpoints were deleted from one
    that was stopped before its first, which may start over.
    """
    path = directory / CHECKPOINT_NOTE
    if not path.exists() and saved_steps(directory):
        path.touch()
    return path.exists()


def keep_settings(
    config: PretrainConfig,
    found: Changes,
    step: int,
    *,
    evaluates_other_text: bool = False,
) -> None:
    """Writes what a run is from a step on: its changes, its files and its config.

    Raises:
      ValueError: the text cannot be found.
      OSError: a file cannot be read or written.
    """
    changes.append_history(
        config.output_dir, found, step, evaluates_other_text=evaluates_other_text
    )
    # The config last: with the old one the same command continues once more.
    identity.save(config.data, config.output_dir)
    save_config(config, config.output_dir / CONFIG_FILE)


@contextlib.contextmanager
def lock_directory(directory: pathlib.Path) -> Iterator[None]:
    """Creates a directory and keeps other processes from working in it.

    Raises:
      ValueError: another one does.
      OSError: it cannot be created or written.
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


def save_config(config: Any, path: pathlib.Path) -> None:
    """Writes all values of a config as JSON, but for how this process began."""
    values = dataclasses.asdict(config)
    values.pop("start", None)
    write_whole(path, json.dumps(values, indent=2, default=str) + "\n")


def load_config(kind: type[Config], path: pathlib.Path) -> Config:
    """Reads what `save_config` wrote.

    Raises:
      ValueError: a value is missing, unknown, or not one that is allowed.
      OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and "optimizer" in values:
            values["optimizer"] = migrated(values["optimizer"])
        config = pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ValueError(f"{path}: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a saved config: {error}") from error
    known = changes.flat_values(dataclasses.asdict(config))
    given = changes.flat_values(values)
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(
            f"{path} is of a newer version of this program: {', '.join(unknown)} "
            "means nothing to this one; update the program"
        )
    # Newer settings have defaults that change nothing.
    if lost := sorted(ALWAYS_SAVED & known.keys() - given.keys()):
        raise ValueError(
            f"{path} is damaged: it has no {', '.join(lost)}; put back the file that "
            "the run wrote"
        )
    return config
