"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import dataclasses
import pathlib
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from train.config.pretrain_config import PretrainConfig
from train.rundir.directory import METRICS_FILE
from train.system import console, files, processes
from train.system.json_lines import JsonLines

CURVE_FILE = "curve.png"
WANDB_ID_FILE = "wandb-id.txt"


class MetricsWriter:
    """Writes metrics of each step to metrics.jsonl and the chosen services.

    Args:
      config: the run.
      last_step: the last step whose row is kept.
    """

    def __init__(self, config: PretrainConfig, last_step: int):
        path = config.output_dir / METRICS_FILE
        # A new run keeps no row, not even that of step 0.
        self._file = JsonLines(path, last_step or -1, _is_row)
        is_first = processes.is_first()
        missing = last_step - len({row["step"] for row in self.rows} - {0})
        if missing > 0 and is_first:
            console.warn(
                f"{path} lacks the rows of {missing:,} of the first {last_step:,} steps"
            )
        self._watchers = _watchers(config, last_step) if is_first else []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run."""
        return self._file.rows

    def write(self, step: int, **values: Any) -> dict[str, Any]:
        """Appends a row, with scalar arrays as numbers, and returns it."""
        numbers = {name: np.asarray(value).item() for name, value in values.items()}
        row = {"step": step} | numbers
        self._file.append(row)
        for watcher in self._watchers:
            watcher.write(step, row)
        return row

    def sync(self) -> None:
        """Flushes the rows to disk."""
        self._file.sync()

    def close(self) -> None:
        """Flushes the rows to disk and closes the services."""
        self.sync()
        for watcher in self._watchers:
            watcher.close()


class _TensorBoard:
    """TensorBoard events in the run's directory, written synchronously.

    The writer of tensorboardX uses a thread, which dies on a full disk; the program
    then waits for it forever.
    """

    def __init__(self, config: PretrainConfig, last_step: int):
        # Slow to import, and optional.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._directory = config.output_dir / "tensorboard"
        with files.errors_name(self._directory):
            self._directory.mkdir(exist_ok=True)
            # The suffix avoids the file of an earlier process in the same second.
            self._writer = event_file_writer.EventsWriter(
                str(self._directory / "events"), f".{last_step}"
            )
        # A session start hides later steps of an earlier process.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(last_step + 1, session_log=start)
        self._flush()

    def write(self, step: int, row: dict[str, Any]) -> None:
        numbers = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        self._write(step, summary=self._summary(value=numbers))
        if time.monotonic() > self._flushed + 10:
            self._flush()

    def close(self) -> None:
        with files.errors_name(self._directory):
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), **content)
        with files.errors_name(self._directory):
            self._writer.write_event(event)

    def _flush(self) -> None:
        self._flushed = time.monotonic()
        with files.errors_name(self._directory):
            self._writer.flush()


class _WeightsAndBiases:
    """Run of Weights & Biases, resumed by the id in the run's directory."""

    def __init__(self, config: PretrainConfig, last_step: int):
        import wandb  # optional package

        run_id = _wandb_id(config.output_dir, last_step)
        try:
            self._run = wandb.init(
                project=config.report.wandb_project,
                id=run_id,
                resume="allow",
                allow_val_change=True,  # settings may change at a resume
                name=config.output_dir.name,
                config=dataclasses.asdict(config),
            )
        except wandb.Error as error:  # not logged in, or no network
            raise OSError(f"--wandb: {error}") from error

    def write(self, step: int, row: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(directory: pathlib.Path, last_step: int) -> str:
    """Reads the run's id from its directory, or writes a new one."""
    path = directory / WANDB_ID_FILE
    if not path.exists():
        if last_step > 0:
            console.warn(
                f"{directory} has no {WANDB_ID_FILE}: the steps after {last_step:,} go "
                "to a new run of Weights & Biases"
            )
        files.write_whole(path, secrets.token_hex(8))
    run_id = path.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", run_id):
        raise OSError(
            f"{path} holds no id of a run of Weights & Biases: delete it to report to "
            "a new one, or write the id into it"
        )
    return run_id


def _is_row(row: dict[str, Any]) -> bool:
    """Whether a JSON object is a row of `MetricsWriter`."""
    is_measured = "loss" in row or "eval_loss" in row
    return is_measured and not any(isinstance(value, str) for value in row.values())


def check_packages(config: PretrainConfig) -> None:
    """Raises a ValueError if the config requires a package that is missing."""
    if not config.report.wandb:
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--wandb needs the package wandb: pip install -e '.[wandb]'"
        ) from error


def _watchers(config: PretrainConfig, last_step: int) -> list[Any]:
    chosen = [
        (config.report.tensorboard, _TensorBoard),
        (config.report.wandb, _WeightsAndBiases),
    ]
    return [watcher(config, last_step) for is_on, watcher in chosen if is_on]


class Stopwatch:
    """Stopwatch for laps, without pauses."""

    def __init__(self):
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or the creation), without pauses."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the `with` block from the lap."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before
