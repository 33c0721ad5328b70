"""Tables and plots of a comparison, from the records of its trials."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import figure

from train.comparison.best_tries import Entry, Try, by_loss
from train.comparison.variants import Sweep, Variant, word
from train.config.methods import resolved
from train.reports import figures

# The loss of the first tenth of a run would flatten all that follows.
SHOWN_FROM_FRACTION = 0.1


def notes(
    entries: Sequence[Entry],
    swept: Sequence[Entry] = (),
    tuning_seeds: Sequence[int] = (),
) -> str:
    """Legend of the tables: words, marks, and how rates were chosen.

    Args:
      entries: those of the first table.
      swept: those of the tables of sweeps.
      tuning_seeds: on which rates were searched, where that is not all seeds.
    """
    searched = ""
    if tuning_seeds:
        plural = "s" if len(tuning_seeds) > 1 else ""
        searched = f" on seed{plural} {', '.join(map(str, tuning_seeds))}"
    lines = [
        "Loss: mean ± standard deviation over seeds, at the rates of the least mean"
        f"{searched}. Matrices: factor on the updates of attention and MLP matrices. "
        "Seconds: of all steps, by the median step of each kind in the fastest trial."
    ]
    if searched:
        counts = sorted({len(entry.tries) for entry in entries})
        tries = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        lines.append(
            f"Rates were searched{searched} alone, with {tries} tries for each method; "
            "other seeds were run at the best of them, unless all diverged."
        )
    at_edge = {rate for entry in (*entries, *swept) for rate in entry.at_edge}
    if at_edge:
        flags = " and ".join(f"--{rate.replace('_', '-')}s" for rate in sorted(at_edge))
        lines.append(
            "\\*: the least or the largest that was tried; the best may lie beyond: "
            f"extend {flags}."
        )
    return "\n".join(lines)


def results_table(entries: Sequence[Entry], steps: int) -> str:
    """One line for each variant, at its best rates, by final loss."""
    rows = [
        (
            *("optimizer", "held-out loss", "seeds", "learning rate", "matrices"),
            *("tries", "seconds", "state, MB"),
        )
    ]
    for entry in by_loss(entries):
        best = entry.best
        rows.append(
            (
                entry.variant.label,
                best.text,
                str(len(best.records)),
                f"{best.learning_rate:g}{_mark(entry, 'learning_rate')}",
                f"{best.matrix_scale:g}{_mark(entry, 'matrix_scale')}",
                str(len(entry.tries)),
                _seconds(entry, steps),
                f"{best.records[0].state_bytes / 1e6:.2f}",
            )
        )
    return markdown(rows)


def grid_table(entries: Sequence[Entry]) -> str:
    """Every try: the mean loss of each learning rate and factor on matrices."""
    rates = sorted({each.learning_rate for e in entries for each in e.tries})
    rows = [("optimizer", "matrices", *(f"{rate:g}" for rate in rates))]
    for entry in by_loss(entries):
        for factor in sorted({each.matrix_scale for each in entry.tries}):
            cells = {
                each.learning_rate: f"**{each.text}**"
                if each is entry.chosen
                else each.text
                for each in entry.tries
                if each.matrix_scale == factor
            }
            found = (cells.get(rate, "") for rate in rates)
            rows.append((entry.variant.label, f"{factor:g}", *found))
    return markdown(rows)


def sweep_table(
    sweep: Sweep, variants: Sequence[Variant], entries: Sequence[Entry]
) -> str:
    """The best mean loss of each variant at each value of one setting."""
    known = {e.variant: e.best.text + _mark(e, *e.at_edge) for e in entries}
    columns = [word(value) for value in sweep.values]
    rows = [(f"optimizer, by {sweep.name}", *columns)]
    for variant in variants:
        cells = (known.get(each, "-") for each in sweep.variants(variant).values())
        rows.append((variant.label, *cells))
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide in a terminal; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def aggregate(entries: Sequence[Entry], steps: int) -> list[dict[str, Any]]:
    """The numbers of the tables, for JSON."""
    return [
        {
            "optimizer": entry.variant.label,
            "settings": dataclasses.asdict(resolved(entry.best.optimizer)),
            "seconds": entry.seconds(steps) if entry.ran_fully else None,
            "step_seconds": entry.step_seconds,
            "state_bytes": entry.best.records[0].state_bytes,
            "best": _numbers(entry.best),
            "at_edge": entry.at_edge,
            "tries": [_numbers(each) for each in entry.tries],
        }
        for entry in by_loss(entries)
    ]


def plot(entries: Sequence[Entry], title: str) -> figure.Figure:
    """Held-out loss against steps and against seconds; a band spans the seeds."""
    fig, (panels,) = figures.panels(1, 2, (11, 4.5), sharey=True)
    colors = matplotlib.color_sequences["tab10" if len(entries) <= 10 else "tab20"]
    ordered = by_loss(entries)
    shown = []
    for k, entry in enumerate(ordered):
        color = colors[k % len(colors)]
        bands = _bands(entry.best)
        steps = [step for step, _ in bands]
        means = [statistics.fmean(losses) for _, losses in bands]
        label = f"{entry.variant.label}: {entry.best.text}"
        for axes, x in zip(
            panels, (steps, [entry.seconds(step) for step in steps]), strict=True
        ):
            axes.plot(x, means, color=color, label=label, marker=".", markersize=3)
            axes.fill_between(
                x,
                [min(losses) for _, losses in bands],
                [max(losses) for _, losses in bands],
                color=color,
                alpha=0.2,
                linewidth=0,
            )
        last = max(steps, default=0)
        shown += [
            loss
            for step, losses in bands
            for loss in losses
            if step >= SHOWN_FROM_FRACTION * last
        ]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        panels[0].set_ylim(min(shown) - margin, max(shown) + margin)
    figures.count(panels[0].xaxis)
    panels[0].set(xlabel="step", ylabel="held-out loss (nats per token)")
    panels[1].set(xlabel="seconds in steps")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[1].legend(
        loc="upper right", fontsize="small", title="final loss, best rates"
    )
    fig.suptitle(title)
    return fig


def _bands(best: Try) -> list[tuple[int, list[float]]]:
    """At each evaluation the losses of all seeds, as far as all have one."""
    curves = [dict(record.evaluations) for record in best.records]
    steps = sorted(set.intersection(*map(set, curves)))
    bands = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, losses) for step, losses in bands if None not in losses]


def _seconds(entry: Entry, steps: int) -> str:
    return f"{entry.seconds(steps):.3g}" if entry.ran_fully else "-"


def _mark(entry: Entry, *rates: str) -> str:
    """A mark where one of these rates is at the edge of what was tried."""
    return "*" if set(rates) & set(entry.at_edge) else ""


def _numbers(each: Try) -> dict[str, Any]:
    losses = [None if math.isinf(loss) else loss for loss in each.losses]
    return {
        "learning_rate": each.learning_rate,
        "matrix_scale": each.matrix_scale,
        "mean": None if None in losses else each.mean,
        "deviation": each.deviation,
        "losses": losses,
    }
