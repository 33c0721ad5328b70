"""Plot of the training and held-out loss of a run over its steps."""

import pathlib
from typing import Any

from train.reports import figures
from train.system.files import write_figure


def plot(
    rows: list[dict[str, Any]], title: str, path: pathlib.Path, unit: str = "tokens"
) -> None:
    """Draws training and held-out loss over the steps as a PNG.

    Args:
      rows: rows of metrics.jsonl; other held-out metrics get a panel of their own.
      title: title of the figure.
      path: path of the PNG.
      unit: what losses are means of, in the plural.
    """
    evaluated = [row for row in rows if "eval_loss" in row]
    measured = sorted(
        {name for row in evaluated for name in row if name.startswith("eval_")}
        - {"eval_loss"}
    )
    count = 2 if measured else 1
    fig, panels = figures.panels(count, 1, (7, 4.5 if count == 1 else 7))
    axes = panels[0][0]
    trained = [row for row in rows if "loss" in row]
    # A line through one point shows nothing.
    marker = "." if len(trained) < 3 else None
    style = {"color": "tab:gray", "linewidth": 0.8, "marker": marker}
    _draw(axes, trained, "loss", label="training batch", **style)
    style = {"color": "tab:blue", "marker": "o"}
    what = "text" if unit == "tokens" else unit
    _draw(axes, evaluated, "eval_loss", label=f"held-out {what}", **style)
    per_token = " (nats per token)" if unit == "tokens" else ""
    axes.set(title=title, xlabel="step", ylabel=f"loss{per_token}")
    axes.legend(loc="upper right")  # "best" takes seconds on long runs
    for name in measured:
        own = [row for row in evaluated if name in row]
        label = name.removeprefix("eval_").replace("_", " ")
        _draw(panels[1][0], own, name, label=label, marker="o")
    if measured:
        panels[1][0].set(xlabel="step", ylabel="held-out metrics")
        panels[1][0].legend(loc="lower right")
    for (each,) in panels:
        figures.count(each.xaxis)
        each.grid(alpha=0.3)
    write_figure(path, fig)


def _draw(axes: Any, rows: list[dict[str, Any]], name: str, **style: Any) -> None:
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row[name] for row in rows], **style)
