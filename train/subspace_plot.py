"""A picture of how the subspaces of a run fit and move, by type and by depth."""

import collections
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure

from train.files import write_figure

QUANTITIES = {
    "captured_energy": "captured energy",
    "grassmann_distance": "Grassmann distance moved (radians)",
    "recovery_ratio": "|Λ| / |G|",
}


def plot(rows: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draws what is known of each type of matrix over the steps and over the layers.

    Above, means over the layers, in a band from the least to the largest of them;
    below, means over all looks, layer by layer. GrassWalk (arXiv 2510.01878, section
    3) draws the captured energy so.

    Args:
      rows: of `diagnostics.jsonl`.
      title: of the figure.
      path: of the PNG.
    """
    shown = [name for name in QUANTITIES if any(name in row for row in rows)]
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        # A Figure of its own needs no display and no global state.
        fig = figure.Figure(figsize=(10, 6), dpi=120, layout="constrained")
        panels = fig.subplots(2, len(shown), squeeze=False)
    labels = _labels(row["matrix"] for row in rows)
    for k, (matrix, label) in enumerate(labels.items()):
        own = [row for row in rows if row["matrix"] == matrix]
        color = f"C{k % 10}"
        for name, over_steps, over_layers in zip(shown, *panels, strict=True):
            steps, values = _grouped(own, "step", name)
            style = {"color": color, "label": label, "marker": "o", "markersize": 2.5}
            over_steps.plot(steps, [np.mean(each) for each in values], **style)
            over_steps.fill_between(
                steps,
                [min(each) for each in values],
                [max(each) for each in values],
                color=color,
                alpha=0.12,
                linewidth=0,
            )
            layers, values = _grouped(own, "layer", name)
            over_layers.plot(layers, [np.mean(each) for each in values], **style)
    for name, over_steps, over_layers in zip(shown, *panels, strict=True):
        over_steps.set(title=QUANTITIES[name], xlabel="step")
        over_layers.set(xlabel="layer")
        over_layers.xaxis.get_major_locator().set_params(integer=True)
        for axes in (over_steps, over_layers):
            axes.grid(alpha=0.3)
            if name == "recovery_ratio":  # orders of magnitude apart
                axes.set_yscale("log")
    panels[0][0].set_ylabel("mean over layers, band: all")
    panels[1][0].set_ylabel("mean over steps")
    fig.suptitle(title)
    handles = panels[0][0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=10, frameon=False)
    write_figure(path, fig)


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
    """As few keys of each path, up to where all end alike, as tell them apart.

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
