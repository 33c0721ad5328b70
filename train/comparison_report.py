"""Tables and plots of a comparison, from the records of its trials."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib import figure

from train.config import OptimizerConfig
from train.records import Record, elapsed_seconds
from train.variants import Sweep, Variant, word

# The loss of the first tenth of a run would flatten all that follows.
SHOWN_FROM_FRACTION = 0.1
NOTES = (
    "Loss: mean ± standard deviation over seeds, at the rates of the least mean. "
    "Matrices: factor on the updates of attention and MLP matrices.\n"
    "\\*: the least or the largest that was tried; the best may lie beyond. "
    "Seconds: of all steps, by the median step of each kind in the fastest trial."
)


@dataclasses.dataclass(frozen=True)
class Try:
    """One choice of learning rate and factor on matrices, over the seeds there are."""

    optimizer: OptimizerConfig
    records: tuple[Record, ...]

    @functools.cached_property
    def losses(self) -> list[float]:
        """Final held-out loss of each seed, infinite where it diverged."""
        return [record.final_loss for record in self.records]

    @property
    def mean(self) -> float:
        """Of the losses; infinite if any is."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two or an infinite one."""
        if len(self.losses) < 2 or math.isinf(self.mean):
            return None
        return statistics.stdev(self.losses)

    @property
    def text(self) -> str:
        """The mean loss with its deviation, or how many seeds diverged."""
        if lost := sum(map(math.isinf, self.losses)):
            return f"diverged ({lost} of {len(self.losses)})"
        return f"{self.mean:.3f}" + (
            "" if self.deviation is None else f" ± {self.deviation:.3f}"
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """All that was tried of one variant; at least one trial has finished."""

    variant: Variant
    tries: tuple[Try, ...]

    @functools.cached_property
    def best(self) -> Try:
        """The least mean loss, of those tries that have the most seeds."""
        seeds = max(len(each.records) for each in self.tries)
        return min(
            (each for each in self.tries if len(each.records) == seeds),
            key=lambda each: each.mean,
        )

    @functools.cached_property
    def step_seconds(self) -> dict[str, float]:
        """Of each kind of step, the median of the trial that was disturbed least.

        Rates and seeds cost no time; whatever else a machine does, does.
        """
        records = [record for each in self.tries for record in each.records]
        kinds = {kind for record in records for kind in record.step_seconds}
        return {
            kind: min(r.step_seconds[kind] for r in records if kind in r.step_seconds)
            for kind in kinds
        }

    def seconds(self, step: int) -> float:
        """What so many steps take; see `elapsed_seconds`."""
        return elapsed_seconds(self.variant.optimizer, self.step_seconds, step)


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
                f"{best.optimizer.learning_rate:g}{_edge(entry, 'learning_rate')}",
                f"{_factor(best):g}{_edge(entry, 'matrix_scale')}",
                str(len(entry.tries)),
                _seconds(entry, steps),
                f"{best.records[0].state_bytes / 1e6:.2f}",
            )
        )
    return markdown(rows)


def grid_table(entries: Sequence[Entry]) -> str:
    """Every try: the mean loss of each learning rate and factor on matrices."""
    rates = sorted({t.optimizer.learning_rate for e in entries for t in e.tries})
    rows = [("optimizer", "matrices", *(f"{rate:g}" for rate in rates))]
    for entry in by_loss(entries):
        for factor in sorted({_factor(each) for each in entry.tries}):
            cells = {
                each.optimizer.learning_rate: f"**{each.text}**"
                if each is entry.best
                else each.text
                for each in entry.tries
                if _factor(each) == factor
            }
            found = (cells.get(rate, "") for rate in rates)
            rows.append((entry.variant.label, f"{factor:g}", *found))
    return markdown(rows)


def sweep_table(
    sweep: Sweep, variants: Sequence[Variant], entries: Sequence[Entry]
) -> str:
    """The best mean loss of each variant at each value of one setting."""
    known = {entry.variant: entry.best.text for entry in entries}
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


def by_loss(entries: Iterable[Entry]) -> list[Entry]:
    """Sorted by final loss; those that diverged come last."""
    return sorted(entries, key=lambda entry: entry.best.mean)


def aggregate(entries: Sequence[Entry], steps: int) -> list[dict[str, Any]]:
    """The numbers of the tables, for JSON."""
    return [
        {
            "optimizer": entry.variant.label,
            "settings": dataclasses.asdict(entry.best.optimizer),
            "seconds": entry.seconds(steps) if _ran_fully(entry) else None,
            "step_seconds": entry.step_seconds,
            "state_bytes": entry.best.records[0].state_bytes,
            "best": _numbers(entry.best),
            "tries": [_numbers(each) for each in entry.tries],
        }
        for entry in by_loss(entries)
    ]


def plot(entries: Sequence[Entry], title: str) -> figure.Figure:
    """Held-out loss against steps and against seconds; a band spans the seeds."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        # A Figure of its own needs no display and no global state.
        fig = figure.Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
        panels = fig.subplots(1, 2, sharey=True)
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
    panels[0].set(xlabel="step", ylabel="held-out loss (nats per token)")
    panels[1].set(xlabel="seconds in steps")
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize="small", title="final loss, best rates")
    fig.suptitle(title)
    return fig


def _bands(best: Try) -> list[tuple[int, list[float]]]:
    """At each evaluation the losses of all seeds, as far as all have one."""
    curves = [dict(record.evaluations) for record in best.records]
    steps = sorted(set.intersection(*map(set, curves)))
    bands = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, losses) for step, losses in bands if None not in losses]


def _ran_fully(entry: Entry) -> bool:
    """Whether there are times of all kinds of steps."""
    return any(not r.diverged for each in entry.tries for r in each.records)


def _seconds(entry: Entry, steps: int) -> str:
    return f"{entry.seconds(steps):.3g}" if _ran_fully(entry) else "-"


def _factor(each: Try) -> float:
    return each.records[0].trial.matrix_scale


def _edge(entry: Entry, rate: str) -> str:
    """A mark where the best is the least or the largest of several that were tried."""
    if rate == "learning_rate":
        value = lambda each: each.optimizer.learning_rate
    else:
        value = _factor
    tried = {value(each) for each in entry.tries}
    at_edge = value(entry.best) in (min(tried), max(tried))
    return "*" if at_edge and len(tried) > 1 else ""


def _numbers(each: Try) -> dict[str, Any]:
    losses = [None if math.isinf(loss) else loss for loss in each.losses]
    return {
        "learning_rate": each.optimizer.learning_rate,
        "matrix_scale": _factor(each),
        "mean": None if None in losses else each.mean,
        "deviation": each.deviation,
        "losses": losses,
    }
