"""Metrics of a run, in metrics.jsonl and in the services that show them."""

from typing import Any

import numpy as np

from train.config.run_config import RunConfig
from train.rundir import services
from train.rundir.directory import METRICS_FILE
from train.system import console, processes
from train.system.json_lines import JsonLines

CURVE_FILE = "curve.png"


class MetricsWriter:
    """Writes metrics of each step to metrics.jsonl and the chosen services.

    Args:
      config: the run.
      last_step: the last step whose row is kept.
    """

    def __init__(self, config: RunConfig, last_step: int):
        path = config.output_dir / METRICS_FILE
        # A new run keeps no row, not even that of step 0.
        self._file = JsonLines(path, last_step or -1, _is_row)
        is_first = processes.is_first()
        missing = last_step - len({row["step"] for row in self.rows} - {0})
        if missing > 0 and is_first:
            console.warn(
                f"{path} lacks the rows of {missing:,} of the first {last_step:,} steps"
            )
        self._services = services.open_services(config, last_step) if is_first else []

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run."""
        return self._file.rows

    def write(self, step: int, **values: Any) -> dict[str, Any]:
        """Appends a row, with scalar arrays as numbers, and returns it."""
        numbers = {name: np.asarray(value).item() for name, value in values.items()}
        row = {"step": step} | numbers
        self._file.append(row)
        for service in self._services:
            service.write(step, row)
        return row

    def sync(self) -> None:
        """Flushes the rows to disk."""
        self._file.sync()

    def close(self) -> None:
        """Flushes the rows to disk and closes the services."""
        self.sync()
        for service in self._services:
            service.close()


def _is_row(row: dict[str, Any]) -> bool:
    """Whether a JSON object is a row of `MetricsWriter`."""
    is_measured = "loss" in row or "eval_loss" in row
    return is_measured and not any(isinstance(value, str) for value in row.values())
