"""Benchmark report: table and bar chart."""

import dataclasses
import pathlib
from collections.abc import Mapping

from train.reports import figures, tables
from train.system.files import write_figure
from train.timing.interleaved import Spread, ratio, spread


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measured cost of one optimizer; None: not measured.

    Attributes:
      compile_seconds: times to trace and compile the program.
      state_bytes: size of the optimizer's state.
      temporary_bytes: memory of the program beside arguments and results.
      peak_bytes: sum of arguments, results and temporaries.
      steady_cycles: the TPU compiler's estimate for a step without a refresh; None if
        every step has one.
      first_seconds: times of first steps, which initialise the subspace.
      steady_seconds: times of steps without a refresh, one per round.
      refresh_seconds: times of steps with a refresh.
    """

    compile_seconds: list[float]
    state_bytes: int
    temporary_bytes: int
    peak_bytes: int
    steady_cycles: int | None = None
    first_seconds: list[float] | None = None
    steady_seconds: list[float] | None = None
    refresh_seconds: list[float] | None = None

    def amortised_seconds(self, interval: int) -> float:
        """Mean time of the steps from one refresh to the next."""
        steady = spread(self.steady_seconds).median
        return steady + (spread(self.refresh_seconds).median - steady) / interval


def table(costs: Mapping[str, Cost], interval: int) -> str:
    """Formats a Markdown table, one row per optimizer; ratios are to the first."""
    base = next(iter(costs.values()))
    titles = ["optimizer", "memory in all", "/ first"]
    if base.steady_seconds is not None:
        titles += ["steady step", "/ first", "refresh / own steady", "first step"]
        titles += [f"mean of {interval} / first"]
    if base.steady_cycles is not None:
        titles += ["estimated steady step", "/ first"]
    titles += ["compile", "/ first", "state", "temporaries"]
    rows = [titles]
    for name, cost in costs.items():
        row = [name, _size(cost.peak_bytes), f"{cost.peak_bytes / base.peak_bytes:.2f}"]
        if cost.steady_seconds is not None:
            steady = spread(cost.steady_seconds).median
            mean = cost.amortised_seconds(interval) / base.amortised_seconds(interval)
            row += [
                f"{1e3 * steady:.1f} ms",
                _ratio(ratio(cost.steady_seconds, base.steady_seconds)),
                f"{spread(cost.refresh_seconds).median / steady:.2f}",
                f"{spread(cost.first_seconds).median:.2f} s",
                f"{mean:.2f}",
            ]
        if base.steady_cycles is not None:
            cycles = cost.steady_cycles
            row += (
                ["-", "-"]
                if cycles is None
                else [
                    f"{cycles / 1e6:.1f} M cycles",
                    f"{cycles / base.steady_cycles:.2f}",
                ]
            )
        row += [
            f"{spread(cost.compile_seconds).median:.1f} s",
            _ratio(ratio(cost.compile_seconds, base.compile_seconds)),
            _size(cost.state_bytes),
            _size(cost.temporary_bytes),
        ]
        rows.append(row)
    return tables.markdown(rows)


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _ratio(value: Spread) -> str:
    if value.low == value.high:
        return f"{value.median:.2f}"
    return f"{value.median:.2f} ({value.low:.2f}-{value.high:.2f})"


def plot(costs: Mapping[str, Cost], interval: int, title: str, path: pathlib.Path):
    """Plots bars of time and memory as multiples of the first optimizer's."""
    base = next(iter(costs.values()))
    panels = {
        "peak memory": [each.peak_bytes / base.peak_bytes for each in costs.values()]
    }
    if base.steady_seconds is not None:
        mean = base.amortised_seconds(interval)
        panels = {
            f"seconds, mean of {interval} steps": [
                each.amortised_seconds(interval) / mean for each in costs.values()
            ]
        } | panels
    drawing, (all_axes,) = figures.panels(
        1, len(panels), (9, 1 + 0.35 * len(costs)), sharey=True
    )
    drawing.suptitle(title)
    for axes, (name, values) in zip(all_axes, panels.items(), strict=True):
        figures.ratio_bars(axes, dict(zip(costs, values, strict=True)))
        axes.set_xlabel(f"{name},\nas a multiple of {next(iter(costs))}'s")
    all_axes[0].invert_yaxis()  # shared by all axes
    write_figure(path, drawing)
