"""Plots with matplotlib in one style: panels, bands, bars of ratios, axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axis, figure, ticker
from matplotlib.axes import Axes

_STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten


def panels(
    rows: int, columns: int, size_inches: tuple[float, float], **shared: Any
) -> tuple[figure.Figure, np.ndarray]:
    """A figure that needs no display and no global state, and its axes in a grid.

    Args:
      rows: number of rows of the grid.
      columns: number of columns of the grid.
      size_inches: width and height.
      **shared: `sharex` or `sharey` of matplotlib's `subplots`.
    """
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        drawing = figure.Figure(size_inches, dpi=120, layout="constrained")
        return drawing, drawing.subplots(rows, columns, squeeze=False, **shared)


def band(
    axes: Axes,
    x: Sequence[float],
    groups: Sequence[Sequence[float]],
    *,
    color: Any,
    alpha: float = 0.2,
    **line: Any,
) -> None:
    """Draws a line through the mean of each group, in a band from least to largest.

    Args:
      axes: where to draw; gets a grid.
      x: the place of each group.
      groups: the values at each x.
      color: color of line and band.
      alpha: opacity of the band.
      **line: other properties of the line.
    """
    axes.plot(x, [np.mean(each) for each in groups], color=color, **line)
    low, high = [min(each) for each in groups], [max(each) for each in groups]
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
    axes.grid(alpha=0.3)


def ratio_bars(axes: Axes, ratios: Mapping[str, float]) -> None:
    """Draws bars from a line at 1 to each ratio, with the number at the end."""
    values = list(ratios.values())
    axes.barh(list(ratios), [value - 1 for value in values], left=1, color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    for row, value in enumerate(values):
        axes.annotate(
            f"{value:.2f}",
            (value, row),
            xytext=(-4 if value < 1 else 4, 0),
            textcoords="offset points",
            horizontalalignment="right" if value < 1 else "left",
            verticalalignment="center",
        )
    # Margins for the numbers at both ends; the axis spans a factor of two at least.
    low, high = min(0.75, *values), max(1.5, *values)
    margin = (high / low) ** 0.15
    axes.set_xlim(low / margin, high * margin)
    use_plain_logarithms(axes.xaxis)


def count(of: axis.Axis) -> None:
    """Puts ticks at whole numbers only, for steps and layers."""
    of.set_major_locator(ticker.MaxNLocator(steps=_STEPS, integer=True, min_n_ticks=1))


def use_plain_logarithms(of: axis.Axis) -> None:
    """Makes an axis logarithmic, with ticks such as 0.5, 1, 2, 5 and 10.

    Call it once the limits of the axis are known.
    """
    of.axes.set(**{f"{of.axis_name}scale": "log"})
    low, high = getattr(of.axes, f"get_{of.axis_name}lim")()
    of.set_major_locator(
        ticker.LogLocator(subs=(1, 2, 5))
        if high / low > 8
        else ticker.MaxNLocator(nbins=7, steps=_STEPS)
    )
    of.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    of.set_minor_locator(ticker.NullLocator())
