"""What a run leaves behind: its directory, metrics.jsonl and the curve."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib import figure

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "curve.png"


def create_run_directory(wanted: pathlib.Path) -> pathlib.Path:
    """Creates the directory of a run, never one that holds a run already.

    Returns:
      `wanted`, or the first of `wanted-2`, `wanted-3`, ... that holds no metrics.

    Raises:
      OSError: the directory cannot be created or written.
    """
    number, path = 1, wanted
    while (path / METRICS_FILE).exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Marks the directory as taken.
        (path / METRICS_FILE).touch(exist_ok=False)
    except OSError as error:
        raise OSError(f"cannot write to --output-dir {path}: {error}") from error
    return path


class MetricsWriter:
    """Appends one JSON object a line; a line is on disk once `write` returns."""

    def __init__(self, directory: pathlib.Path):
        self._path = directory / METRICS_FILE
        self.rows: list[dict[str, Any]] = []

    def write(self, **values: Any) -> None:
        """Adds a line; arrays of one element become numbers."""
        row = {k: v if isinstance(v, int) else float(v) for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)


class Stopwatch:
    """Measures laps, leaving out what happens during pauses."""

    def __init__(self):
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or the creation), pauses not counted."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside the `with` block out of the lap."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def plot_curve(rows: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draws training and held-out loss over the steps as a PNG."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        # A Figure of its own needs no display and no global state.
        fig = figure.Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
        axes = fig.subplots()
    axes.plot(
        [row["step"] for row in rows],
        [row["loss"] for row in rows],
        color="tab:gray",
        linewidth=0.8,
        label="training batch",
    )
    evaluations = [row for row in rows if "eval_loss" in row]
    axes.plot(
        [row["step"] for row in evaluations],
        [row["eval_loss"] for row in evaluations],
        color="tab:blue",
        marker="o",
        label="held-out text",
    )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    fig.savefig(path)
