"""Journal of a run: metrics of each step, progress bar, end on divergence."""

import time
from typing import Any

import jax
import tqdm

from train.config.run_config import RunConfig
from train.rundir import metrics
from train.rundir.directory import note_checkpoint
from train.step import throughput
from train.step.throughput import Counted
from train.system import processes
from train.system.stopwatch import Stopwatch


class DivergedError(Exception):
    """Too many consecutive steps had an infinite or NaN loss or gradient."""


class Journal:
    """Context manager that records each step and plots the loss curve at its end.

    Args:
      config: the run.
      first: the step after which it begins.
      counted: what steps count.
    """

    def __init__(self, config: RunConfig, first: int, counted: Counted):
        self._config, self._counted = config, counted
        # A new run drops an old row of step 0, which may belong to another config.
        self._writer = metrics.MetricsWriter(config, first or -1)
        self._has_checkpoint = False
        self._peak_flops = throughput.peak_flops(config.report.peak_teraflops)
        self._bar = tqdm.tqdm(
            total=config.steps,
            initial=first,
            unit="step",
            dynamic_ncols=True,
            disable=not processes.is_first(),
        )
        self._skipped = [0, 0]  # in total, and consecutive up to now
        for row in self.rows:
            self._count_skipped(row.get("skipped_steps", self._skipped[0]))
        self._total, seconds = self._totals(first)
        self._began = time.perf_counter() - seconds
        self.watch = Stopwatch()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run."""
        return self._writer.rows

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps among those recorded."""
        return self._skipped[0]

    def begin(self, **evaluation: float) -> None:
        """Records an evaluation before training, as step 0."""
        nothing = {self._counted.unit: 0, "epoch": 0.0, "elapsed_seconds": 0.0}
        self._writer.write(0, **evaluation, skipped_steps=0, **nothing)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Waits for a step and records it.

        Args:
          step: the step.
          values: its metrics; `count`, of its tokens or examples, is replaced by the
            total of all steps, and by its own number if that is `of_loss`.
        """
        values, unit = jax.device_get(values), self._counted.unit
        in_batch = int(values.pop("count"))
        if self._counted.of_loss is not None:
            values[self._counted.of_loss] = in_batch
            in_batch = round(in_batch * float(values.pop(unit)))
        self._total += in_batch
        values[unit] = self._total
        values["elapsed_seconds"] = time.perf_counter() - self._began
        rate = in_batch / self.watch.lap()
        values[f"{unit}_per_second"] = rate
        if self._peak_flops is not None and self._counted.flops is not None:
            values["mfu"] = rate * self._counted.flops / self._peak_flops
        values["peak_memory_bytes"] = throughput.peak_memory_bytes()
        row = self._writer.write(step, **values)
        shown = {"loss": f"{row['loss']:.3f}", f"{unit}/s": f"{rate:,.0f}"}
        if "mfu" in row:
            shown["MFU"] = f"{row['mfu']:.1%}"
        self._bar.set_postfix(shown)
        self._bar.update()
        if "eval_loss" in row:
            self._bar.write(f"step {step}: held-out {evaluation_words(row)}")
        self._note_checkpoint()
        self._check_skipped(step, row["skipped_steps"])

    def _note_checkpoint(self) -> None:
        if not self._has_checkpoint and processes.is_first():
            self._has_checkpoint = note_checkpoint(self._config.output_dir)

    def sync(self) -> None:
        """Flushes all rows to disk."""
        self._writer.sync()

    def _totals(self, step: int) -> tuple[int, float]:
        """Tokens or examples, and seconds, of earlier processes up to a step.

        If its row is missing or has no counts, those since the last count are
        extrapolated; seconds since then are not counted.
        """
        unit, in_step = self._counted.unit, self._counted.in_batch
        counts = (row for row in reversed(self.rows) if row.get(unit))
        last = next(counts, {"step": 0, unit: 0, "elapsed_seconds": 0.0})
        if last["step"]:
            in_step = last[unit] / last["step"]
        missing = round((step - last["step"]) * in_step)
        return last[unit] + missing, last["elapsed_seconds"]

    def _count_skipped(self, skipped: int) -> int:
        """Updates the counts; returns the consecutive skipped steps up to this one."""
        before, in_a_row = self._skipped
        self._skipped = [skipped, in_a_row + 1 if skipped > before else 0]
        return self._skipped[1]

    def _check_skipped(self, step: int, skipped: int) -> None:
        limit = self._config.max_skipped_steps_in_a_row
        if self._count_skipped(skipped) >= limit:
            raise DivergedError(
                f"the last {limit} steps, to step {step}, had a loss or a gradient "
                "that is not finite and were skipped: lower --learning-rate or "
                "--max-gradient-norm, or look at the data; a larger "
                "--max-skipped-steps-in-a-row is more patient"
            )

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        from train.reports import loss_plot  # matplotlib is slow to import

        self._bar.close()
        try:
            self._note_checkpoint()
            self._writer.close()
            if processes.is_first():
                loss_plot.plot(
                    self.rows,
                    self._config.title,
                    self._config.output_dir / metrics.CURVE_FILE,
                    unit=self._counted.unit,
                )
        except OSError:
            if error is None:  # otherwise the first error is reported
                raise


def evaluation_words(row: dict[str, Any]) -> str:
    """Values of an evaluation, in words.

    >>> evaluation_words({"step": 3, "eval_loss": 0.25, "eval_macro_f1": 0.5})
    'loss 0.250, macro f1 0.500'
    """
    found = {name[5:]: row[name] for name in row if name.startswith("eval_")}
    return ", ".join(f"{name.replace('_', ' ')} {found[name]:.3f}" for name in found)
