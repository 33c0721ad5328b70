"""The directory of a run: whose it is, whether it is in use, what it was told."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, TypeVar

import filelock
import pydantic

from train.config import PretrainConfig
from train.files import write_whole
from train.optimizer_config import migrated
from train.rules import flag

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"

Config = TypeVar("Config")


@contextlib.contextmanager
def open_directory(config: PretrainConfig) -> Iterator[bool]:
    """Takes `config.output_dir` for a run, for as long as the context lasts.

    Yields:
      Whether it holds steps of this run already, which is then to be continued.

    Raises:
      ValueError: it holds a run of another config, or one that is running, or none
        where one was to be resumed.
      OSError: it cannot be created, read or written.
    """
    directory = config.output_dir
    saved, metrics = directory / CONFIG_FILE, directory / METRICS_FILE
    if config.start.resume and not saved.exists():
        raise ValueError(
            f"--resume: there is no run in --output-dir {directory}; without --resume "
            "one is started there"
        )
    with lock_directory(directory):
        # A run without a first step may be overwritten: it has but what was before.
        has_steps = metrics.exists() and not _is_before_training(metrics.read_text())
        checkpoints = list((directory / CHECKPOINTS).glob("*"))
        before = [path for path in checkpoints if path.name.split(".")[0] == "0"]
        has_steps = has_steps or len(before) < len(checkpoints)
        found = saved.exists() and has_steps
        if not has_steps:
            metrics.unlink(missing_ok=True)
            for path in before:
                shutil.rmtree(path)
        if found:
            changed = differences(config, load_config(PretrainConfig, saved))
            if changed:
                raise ValueError(
                    f"--output-dir {directory} holds another run: "
                    f"{'; '.join(changed)}. Give its values to continue it, or "
                    "another directory"
                )
        yield found


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
    except ValueError as error:
        raise ValueError(f"{path} is not a saved config: {error}") from error
    # Another version's fields would be dropped or filled in without a word.
    known, given = _flat(dataclasses.asdict(config)), _flat(values)
    strange = sorted(
        name for name in known.keys() ^ given.keys() if not name.startswith("start.")
    )
    if strange:
        raise ValueError(
            f"{path} is of another version of this program, which differs in "
            f"{', '.join(strange)}"
        )
    return config


def differences(config: Any, other: Any) -> list[str]:
    """What makes two configs different runs, as "--flag 1 here, 2 there".

    Where a run is kept, saved and watched makes no difference to its numbers, nor
    does how long it bears skipped steps.
    """
    values, others = (_flat(_resolved(each)) for each in (config, other))
    free = re.compile(
        r"output_dir|mesh|max_skipped_steps_in_a_row|data\.token_cache_dir|"
        r"(checkpoint|report|sample|start)\..*"
    )
    return [
        f"{flag(name)} {values[name]} here, {others[name]} there"
        for name in values
        if values[name] != others[name] and not free.fullmatch(name)
    ]


def _resolved(config: Any) -> dict[str, Any]:
    """Values of a config, alike for all that mean the same optimizer."""
    from train.methods import resolved  # needs JAX, which errors before do not

    values = dataclasses.asdict(config)
    if "optimizer" in values:
        values["optimizer"] = dataclasses.asdict(resolved(config.optimizer))
    return values


def _is_before_training(rows: str) -> bool:
    """Whether metrics hold nothing but the row of step 0, if that."""
    with contextlib.suppress(ValueError, AttributeError):
        return not rows or json.loads(rows).get("step") == 0
    return False


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
