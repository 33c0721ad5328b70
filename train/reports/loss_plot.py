"""Plot of the training and held-out loss of a run over its steps."""

import pathlib
from typing import Any

from train.reports import figures
from train.system.files import write_figure


def plot(rows: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draws training and held-out loss over the steps as a PNG."""
    fig, ((axes,),) = figures.panels(1, 1, (7, 4.5))
    trained = [row for row in rows if "loss" in row]
    # A line through one point shows nothing.
    marker = "." if len(trained) < 3 else None
    style = {"color": "tab:gray", "linewidth": 0.8, "marker": marker}
    _draw(axes, trained, "loss", label="training batch", **style)
    evaluated = [row for row in rows if "eval_loss" in row]
    style = {"color": "tab:blue", "marker": "o"}
    _draw(axes, evaluated, "eval_loss", label="held-out text", **style)
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    figures.count(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")  # "best" takes seconds on long runs
    write_figure(path, fig)


def _draw(axes: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row[name] for row in rows], **style)
