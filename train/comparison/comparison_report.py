"""Tables, plot and numbers of a comparison, from the records of its trials."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib import figure

from train.comparison.search import Entry, Finished, Search
from train.comparison.variants import Sweep
from train.config.rules import flag
from train.reports import figures, tables
from train.system.files import write_figure, write_whole

# The loss of the first tenth of a run would flatten all that follows.
SHOWN_FROM_FRACTION = 0.1


def write(search: Search, finished: Finished) -> str:
    """Writes tables, plot and numbers of finished trials; returns the tables.

    Seeds that lack some trials are left out, unless no searched seed is complete.
    """
    config = search.config
    later = search.later_trials(finished)
    lacking = {t.seed for t in (*search.trials, *later) if t not in finished}
    seeds = [seed for seed in config.searched_seeds if seed not in lacking]
    seeds = seeds or config.searched_seeds
    kept = [trial for trial in later if trial.seed not in lacking]
    main = search.entries(search.variants, finished, seeds, kept)
    swept = {
        sweep.name: search.entries(
            itertools.chain(*sweep.rows.values()), finished, seeds, kept
        )
        for sweep in search.sweeps
    }
    tuning_seeds = seeds if config.later_seeds else ()
    first, task = next(iter(finished.values())), config.task
    title = (
        f"{config.preset}, {first.parameters / 1e6:.3g} M parameters: {task.steps:,} "
        f"steps of {task.data.batch_size_tokens:,} tokens on {first.machine['device']}"
    )
    parts = [
        f"# {title}",
        results_table(main),
        notes(main, [*itertools.chain(*swept.values())], tuning_seeds),
        "## All that was tried",
        grid_table(main),
    ]
    for sweep in search.sweeps:
        parts += [f"## {sweep.name}", sweep_table(sweep, [*main, *swept[sweep.name]])]
    text = "\n\n".join(parts) + "\n"
    results = {
        "title": title,
        "machine": first.machine,
        "versions": first.versions,
        "tuning_seeds": tuning_seeds,
        "optimizers": _numbers(main),
        "sweeps": {name: _numbers(found) for name, found in swept.items()},
    }
    directory = config.output_dir
    write_whole(directory / "table.md", text)
    write_whole(directory / "results.json", json.dumps(results, indent=2) + "\n")
    write_figure(directory / "loss.png", plot(main, title))
    return text


def notes(
    entries: Sequence[Entry],
    swept: Sequence[Entry] = (),
    tuning_seeds: Sequence[int] = (),
) -> str:
    """Legend of the tables: words, marks, and how rates were chosen.

    `tuning_seeds` are those on which rates were searched, if that is not all seeds.
    """
    searched = ""
    if tuning_seeds:
        plural = "s" if len(tuning_seeds) > 1 else ""
        searched = f" on seed{plural} {', '.join(map(str, tuning_seeds))}"
    text = (
        "Loss: mean ± standard deviation over seeds, at the rates of the least mean"
        f"{searched}. Matrices: factor on the updates of attention and MLP matrices. "
        "Seconds: of all steps, by the median step of each kind in the fastest trial."
    )
    if searched:
        counts = sorted({len(entry.tries) for entry in entries})
        tries = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        text += (
            f"\nRates were searched{searched} alone, with {tries} tries for each "
            "method; other seeds were run at the best of them, unless all diverged."
        )
    if at_edge := {rate for entry in (*entries, *swept) for rate in entry.at_edge}:
        flags = " and ".join(f"{flag(rate)}s" for rate in sorted(at_edge))
        text += (
            "\n\\*: the least or the largest that was tried; the best may lie beyond: "
            f"extend {flags}."
        )
    return text


def results_table(entries: Sequence[Entry]) -> str:
    """One line for each variant, at its best rates."""
    head = (
        "optimizer|held-out loss|seeds|learning rate|matrices|tries|seconds|state, MB"
    )
    rows = [head.split("|")]
    for entry in entries:
        best = entry.best
        row = [entry.optimizer, best.text, len(best.losses)]
        row += [f"{best.learning_rate:g}{_mark(entry, 'learning_rate')}"]
        row += [f"{best.matrix_scale:g}{_mark(entry, 'matrix_scale')}"]
        row += [len(entry.tries)]
        row += ["-" if entry.seconds is None else f"{entry.seconds:.3g}"]
        rows.append([*map(str, row), f"{entry.state_bytes / 1e6:.2f}"])
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


def sweep_table(sweep: Sweep, entries: Sequence[Entry]) -> str:
    """The best mean loss of each variant at each value of one setting."""
    known = {e.optimizer: e.best.text + _mark(e, *e.at_edge) for e in entries}
    rows = [[f"optimizer, by {sweep.name}", *sweep.values]]
    for variant, forms in sweep.rows.items():
        cells = (known.get(form.label, "-") for form in forms)
        rows.append([variant.label, *cells])
    return tables.markdown(rows)


def plot(entries: Sequence[Entry], title: str) -> figure.Figure:
    """Held-out loss against steps and against seconds; a band spans the seeds."""
    fig, (panels,) = figures.panels(1, 2, (11, 4.5), sharey=True)
    colors = matplotlib.color_sequences["tab10" if len(entries) <= 10 else "tab20"]
    shown: list[float] = []
    for k, entry in enumerate(entries):
        steps, seconds, losses = (
            zip(*entry.curve, strict=True) if entry.curve else [()] * 3
        )
        style = {"color": colors[k % len(colors)], "marker": ".", "markersize": 3}
        style["label"] = f"{entry.optimizer}: {entry.best.text}"
        for axes, x in zip(panels, (steps, seconds), strict=True):
            figures.band(axes, x, losses, **style)
        first = SHOWN_FROM_FRACTION * max(steps, default=0)
        shown += [x for step, _, each in entry.curve if step >= first for x in each]
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


def _mark(entry: Entry, *rates: str) -> str:
    """A mark where one of these rates is at the edge of what was tried."""
    return "*" if set(rates) & set(entry.at_edge) else ""


def _numbers(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Entries for JSON, without their curves."""
    found = [dataclasses.asdict(entry) for entry in entries]
    return [{name: e[name] for name in e if name != "curve"} for e in found]
