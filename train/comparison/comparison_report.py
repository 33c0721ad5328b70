"""Tables, plot and numbers of a comparison, from the records of its trials."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib import figure

from train.comparison.outcomes import Entry
from train.comparison.search import Finished, Search
from train.comparison.variants import Sweep
from train.config.rules import flag
from train.reports import figures, tables
from train.system.files import write_figure, write_whole

# The loss of the first tenth of a run would flatten all that follows.
SHOWN_FROM_FRACTION = 0.1


def write(search: Search, counted: Finished) -> str:
    """Writes tables, plot and numbers of trials; returns the tables, "" without any."""
    if not counted:
        return ""
    config, entries = search.config, search.entries(counted)
    main = [entries[each] for each in entries if each in search.variants]
    seeds = [seed for seed in search.seeds if any(t.seed == seed for t in counted)]
    tuning_seeds = seeds if search.later_seeds else []
    first, task = next(iter(counted.values())), config.task
    title = (
        f"{config.preset}, {first.parameters / 1e6:.3g} M parameters: {task.steps:,} "
        f"steps of {task.data.batch_size_tokens:,} tokens on {first.machine['device']}"
    )
    parts = [
        f"# {title}",
        results_table(main),
        notes(main, entries.values(), tuning_seeds),
        "## All that was tried",
        grid_table(main),
    ]
    results = {
        "title": title,
        "machine": first.machine,
        "versions": first.versions,
        "tuning_seeds": tuning_seeds,
        "optimizers": list(map(_numbers, main)),
        "sweeps": {},
    }
    for sweep in search.sweeps:
        forms = {form for _, *row in sweep.rows for form in row}
        swept = [entries[form] for form in entries if form in forms]
        results["sweeps"][sweep.name] = list(map(_numbers, swept))
        parts += [f"## {sweep.name}", sweep_table(sweep, [*main, *swept])]
    text, directory = "\n\n".join(parts) + "\n", config.output_dir
    write_whole(directory / "table.md", text)
    write_whole(directory / "results.json", json.dumps(results, indent=2) + "\n")
    write_figure(directory / "loss.png", plot(main, title))
    return text


def notes(
    main: Sequence[Entry], entries: Iterable[Entry], tuning_seeds: Sequence[int] = ()
) -> str:
    """Legend of the tables: words, marks, and how rates were chosen.

    Args:
      main: entries of the first tables.
      entries: entries of all tables.
      tuning_seeds: seeds of the search over rates, unless all.
    """
    seeds = f"seed{'s' * (len(tuning_seeds) > 1)} {', '.join(map(str, tuning_seeds))}"
    searched = f" on {seeds}" if tuning_seeds else ""
    lines = [
        "Loss: mean ± standard deviation over seeds, at the rates of the least mean"
        f"{searched}. Matrices: factor on the updates of attention and MLP matrices. "
        "Seconds: of all steps, by the median step of each kind in the fastest trial."
    ]
    if searched:
        counts = sorted({len(entry.tries) for entry in main})
        tries = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        lines.append(
            f"Rates were searched{searched} alone, with {tries} tries for each method; "
            "other seeds were run at the best of them, unless all diverged."
        )
    if at_edge := {rate for entry in entries for rate in entry.at_edge}:
        flags = " and ".join(f"{flag(rate)}s" for rate in sorted(at_edge))
        lines.append(
            "\\*: the least or the largest that was tried; the best may lie beyond: "
            f"extend {flags}."
        )
    return "\n".join(lines)


def results_table(entries: Sequence[Entry]) -> str:
    """One line for each variant, at its best rates."""
    head = "optimizer|held-out loss|seeds|learning rate|matrices|tries|seconds"
    rows = [[*head.split("|"), "state, MB"]]
    for entry in entries:
        row = [entry.optimizer, entry.best.text, str(len(entry.best.losses))]
        row += [entry.rate("learning_rate"), entry.rate("matrix_scale")]
        row += [str(len(entry.tries))]
        row += ["-" if entry.seconds is None else f"{entry.seconds:.3g}"]
        rows.append([*row, f"{entry.state_bytes / 1e6:.2f}"])
    return tables.markdown(rows)


def grid_table(entries: Sequence[Entry]) -> str:
    """Every try: the mean loss of each learning rate and factor on matrices."""
    rates = sorted({each.learning_rate for e in entries for each in e.tries})
    rows = [["optimizer", "matrices", *(f"{rate:g}" for rate in rates)]]
    for entry in entries:
        best = (entry.best.learning_rate, entry.best.matrix_scale)
        cells = {(e.learning_rate, e.matrix_scale): e.text for e in entry.tries}
        cells[best] = f"**{cells[best]}**"
        for factor in sorted({factor for _, factor in cells}):
            found = (cells.get((rate, factor), "") for rate in rates)
            rows.append([entry.optimizer, f"{factor:g}", *found])
    return tables.markdown(rows)


def sweep_table(sweep: Sweep, entries: Iterable[Entry]) -> str:
    """The best mean loss of each variant at each value of one setting."""
    known = {e.optimizer: e.best.text + "*" * bool(e.at_edge) for e in entries}
    rows = [[f"optimizer, by {sweep.name}", *sweep.values]]
    for variant, *forms in sweep.rows:
        rows.append([variant.label, *(known.get(form.label, "-") for form in forms)])
    return tables.markdown(rows)


def plot(entries: Sequence[Entry], title: str) -> figure.Figure:
    """Held-out loss against steps and against seconds; a band spans the seeds."""
    fig, (panels,) = figures.panels(1, 2, (11, 4.5), sharey=True)
    colors = matplotlib.color_sequences["tab10" if len(entries) <= 10 else "tab20"]
    shown: list[float] = []
    for k, entry in enumerate(entries):
        curve = entry.curve
        steps, seconds, losses = zip(*curve, strict=True) if curve else [()] * 3
        style = {"color": colors[k % len(colors)], "marker": ".", "markersize": 3}
        style["label"] = f"{entry.optimizer}: {entry.best.text}"
        for axes, x in zip(panels, (steps, seconds), strict=True):
            figures.band(axes, x, losses, **style)
        first = SHOWN_FROM_FRACTION * max(steps, default=0)
        shown += [x for step, _, each in curve if step >= first for x in each]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        panels[0].set_ylim(min(shown) - margin, max(shown) + margin)
    figures.count(panels[0].xaxis)
    panels[0].set(xlabel="step", ylabel="held-out loss (nats per token)")
    panels[1].set(xlabel="seconds in steps")
    panels[1].legend(
        loc="upper right", fontsize="small", title="final loss, best rates"
    )
    fig.suptitle(title)
    return fig


def _numbers(entry: Entry) -> dict[str, Any]:
    """An entry for JSON, without its curve."""
    values = dataclasses.asdict(entry)
    del values["curve"]
    return values
