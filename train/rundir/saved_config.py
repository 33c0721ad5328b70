"""Saved configs: config.json of a run or a comparison."""

import dataclasses
import json
import pathlib
from typing import Any, TypeVar

import pydantic

from train.config.optimizer_config import migrated
from train.rundir import changes
from train.system.files import write_whole

CONFIG_FILE = "config.json"
# Settings saved by every version.
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


def save_config(config: Any, path: pathlib.Path) -> None:
    """Saves a config as JSON, without the settings of the process (`start`)."""
    values = dataclasses.asdict(config)
    values.pop("start", None)
    write_whole(path, json.dumps(values, indent=2, default=str) + "\n")


def load_config(kind: type[Config], path: pathlib.Path) -> Config:
    """Loads a config that `save_config` wrote.

    Raises:
      ValueError: a value is missing, unknown, or invalid.
      OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and "optimizer" in values:
            values["optimizer"] = migrated(values["optimizer"])
        config = pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {first_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a saved config: {error}") from error
    known = changes.flat_values(dataclasses.asdict(config))
    given = changes.flat_values(values)
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(
            f"{path} is of a newer version of this program: {', '.join(unknown)} "
            "means nothing to this one; update the program"
        )
    # Settings added later may be missing: their defaults change nothing.
    if lost := sorted(ALWAYS_SAVED & known.keys() - given.keys()):
        raise ValueError(
            f"{path} is damaged: it has no {', '.join(lost)}; put back the file that "
            "the run wrote"
        )
    return config


def first_problem(error: ValueError) -> str:
    """The first of pydantic's errors, with its place; another error's own message."""
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "all of it"
    return f"{where}: {first['msg']}"
