"""Plot of how subspaces fit and move, by type of matrix and by layer."""

import collections
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from train.reports import figures
from train.system.files import write_figure

QUANTITIES = {
    "captured_energy": "share of the gradient's squared norm\ninside the subspace",
    "grassmann_distance": "distance that the subspace moved\n(norm of angles, radians)",
    "recovery_ratio": "norm of the recovered part,\nas a multiple of the gradient's",
}


def plot(rows: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draws each quantity by type of matrix, over the steps and over the layers.

    Above, means over the layers, in a band from the least to the largest of them;
    below, means over all rows, layer by layer. GrassWalk (arXiv 2510.01878, section
    3) draws the captured energy so. Quantities without a finite value are left out;
    without any, no file is written.

    Args:
      rows: rows of `diagnostics.jsonl`.
      title: title of the figure.
      path: path of the PNG.
    """
    shown = {name: _values(rows, name) for name in QUANTITIES if _values(rows, name)}
    if not shown:
        return
    fig, panels = figures.panels(2, len(shown), (1 + 3.2 * len(shown), 6))
    labels = _labels(row["matrix"] for row in rows)
    for k, (matrix, label) in enumerate(labels.items()):
        own = [row for row in rows if row["matrix"] == matrix]
        style = {"color": f"C{k % 10}", "label": label}
        style |= {"marker": "o", "markersize": 2.5}
        for name, over_steps, over_layers in zip(shown, *panels, strict=True):
            figures.band(over_steps, *_grouped(own, "step", name), alpha=0.12, **style)
            layers, values = _grouped(own, "layer", name)
            over_layers.plot(layers, [np.mean(each) for each in values], **style)
    for (name, values), *column in zip(shown.items(), *panels, strict=True):
        column[0].set_title(QUANTITIES[name], fontsize="medium")
        for axes, counted in zip(column, ("step", "layer"), strict=True):
            axes.set_xlabel(counted)
            figures.count(axes.xaxis)
            axes.grid(alpha=0.3)
            if name == "recovery_ratio" and min(values) > 0:
                # The values differ by orders of magnitude.
                figures.use_plain_logarithms(axes.yaxis)
    panels[0][0].set_ylabel("mean over layers\n(shaded: lowest to highest)")
    panels[1][0].set_ylabel("mean over steps")
    fig.suptitle(title)
    handles = panels[0][0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=10, frameon=False)
    write_figure(path, fig)


def _values(rows: Iterable[dict[str, Any]], name: str) -> list[float]:
    values = (row.get(name, math.nan) for row in rows)
    return [value for value in values if math.isfinite(value)]


def _grouped(
    rows: Iterable[dict[str, Any]], key: str, name: str
) -> tuple[list[int], list[list[float]]]:
    """The finite values of a quantity by step or layer, in order."""
    groups = collections.defaultdict(list)
    for row in rows:
        if math.isfinite(row.get(name, math.nan)):
            groups[row[key]].append(row[name])
    keys = sorted(groups)
    return keys, [groups[key] for key in keys]


def _labels(matrices: Iterable[str]) -> dict[str, str]:
    """Shortest distinct labels of paths, without the keys at which all end alike.

    >>> _labels(["layers/mlp/up/kernel", "layers/mlp/down/kernel"])
    {'layers/mlp/up/kernel': 'up', 'layers/mlp/down/kernel': 'down'}
    """
    paths = {matrix: matrix.split("/") for matrix in matrices}
    while (
        len({keys[-1] for keys in paths.values()}) == 1 < min(map(len, paths.values()))
    ):
        paths = {matrix: keys[:-1] for matrix, keys in paths.items()}
    for count in range(1, max(map(len, paths.values()), default=1) + 1):
        labels = {matrix: "/".join(keys[-count:]) for matrix, keys in paths.items()}
        if len(set(labels.values())) == len(labels):
            break
    return labels
