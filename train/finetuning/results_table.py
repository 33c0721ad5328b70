"""Table of the results of several runs: mean and deviation over seeds."""

import collections
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from train.config.results_config import ResultsConfig
from train.finetuning import results
from train.reports import tables
from train.system import console

# Runs that agree in the first are in one table, in both in one row.
_TABLE = ("task", "source", "init_from", "metric")
_ROW = ("optimizer", "settings", "freeze", "steps")
_NEEDED = {
    *(*_TABLE, *_ROW, "rank", "learning_rate", "majority", "best", "last", "test"),
    *("seed", "state_bytes", "examples_per_second", "update_seconds"),
}


def run(config: ResultsConfig) -> None:
    """Prints the tables; errors that a user can cause end with one line."""
    with console.user_errors(ValueError, OSError):
        found = [_load(directory) for directory in config.runs]
    with console.reader_may_leave():
        print(table(found))


def _load(directory: pathlib.Path) -> dict[str, Any]:
    found = results.load(directory)
    if found is None:
        raise ValueError(
            f"{directory} has no {results.RESULTS_FILE}: it is not the directory of a "
            "finished run of train.finetune"
        )
    if missing := sorted(_NEEDED - found.keys()):
        raise ValueError(
            f"{directory / results.RESULTS_FILE} has no {', '.join(missing)}: another "
            "version of the program wrote it; delete it, and --resume the run, which "
            "writes it anew"
        )
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """One table for each task, source of rows and model; a row for each setting.

    Args:
      found: contents of results.json.

    Raises:
      ValueError: a run is given twice.
    """
    parts = []
    for runs in _grouped(found, _TABLE):
        task, source, model, metric = (runs[0].get(name) for name in _TABLE)
        head = [
            *("optimizer", "rank", "rate", "steps"),
            *(f"held-out {metric}", "last", "test"),
            *("runs", "state MiB", "rows/s", "update ms"),
        ]
        rows = [head] + [_row(each) for each in _grouped(runs, _ROW)]
        majority = _spread([each["majority"] for each in runs])
        parts.append(
            f"{task}, rows of {source}, {model}; majority class {majority}\n\n"
            f"{tables.markdown(rows)}"
        )
    return "\n\n".join(parts)


def _grouped(
    found: Sequence[dict[str, Any]], names: Sequence[str]
) -> list[list[dict[str, Any]]]:
    groups = collections.defaultdict(list)
    for each in found:
        key = json.dumps([each.get(name) for name in names], sort_keys=True)
        groups[key].append(each)
    return list(groups.values())


def _row(runs: list[dict[str, Any]]) -> list[str]:
    first = runs[0]
    name = first["optimizer"]
    if first["freeze"] != "none":
        name += f", {first['freeze']} frozen"
    if first["settings"].get("moments_dtype") is not None:
        name += f", {first['settings']['moments_dtype']} moments"
    tests = [
        values[first["metric"]] for each in runs for values in each["test"].values()
    ]
    rank = "" if first["rank"] is None else str(first["rank"])
    return [
        name,
        rank,
        f"{first['learning_rate']:g}",
        f"{first['steps']:,}",
        _spread([each["best"] for each in runs]),
        _spread([each["last"] for each in runs]),
        _spread(tests) if tests else "",
        str(len({each["seed"] for each in runs})),
        f"{first['state_bytes'] / 2**20:.1f}",
        f"{_median(runs, 'examples_per_second'):,.0f}",
        f"{1000 * _median(runs, 'update_seconds'):,.1f}",
    ]


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in runs)


def _spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation of several, in percent.

    >>> _spread([0.8, 0.9]), _spread([0.5])
    ('85.00 ± 7.07', '50.00')
    """
    mean = f"{100 * statistics.mean(values):.2f}"
    if len(set(values)) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values):.2f}"
