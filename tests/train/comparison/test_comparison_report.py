"""Tables of made-up records, whose numbers are known."""

import dataclasses
import json
import math
import pathlib

import pydantic
import pytest

from train.comparison import comparison_report as report
from train.comparison.outcomes import Entry, choose
from train.comparison.trial_records import Record, Trial
from train.comparison.variants import parse_sweep, parse_variant
from train.config.optimizer_config import OptimizerConfig

STEPS = 10
BASE = OptimizerConfig(rank=4, update_interval=5)


def record(optimizer, seed, losses, seconds=1.0):
    """A record of evaluations after every second step; None diverges."""
    return Record(
        trial=Trial(optimizer, seed),
        diverged=None in losses,
        skipped_steps=0,
        evaluations=[(2 * k + 2, loss) for k, loss in enumerate(losses)],
        curve=[],
        step_seconds={"first": 5.0, "steady": seconds, "moving": 3.0},
        measured_seconds=99.0,
        compile_seconds=1.0,
        state_bytes=2_500_000,
        parameters=100,
        versions={},
        machine={"device": "cpu"},
        command="",
    )


def tries(text, losses, scales=(1.0,), seconds=1.0):
    """Records of a variant at rates of 0.1, 0.2, ... with final losses of each seed."""
    rates = [(k + 1) / 10 for k in range(len(losses) // len(scales))]
    searched = parse_variant(text, BASE, rates, scales).searched
    return [
        [
            record(optimizer, seed, [9.0, loss], seconds)
            for seed, loss in enumerate(each)
        ]
        for optimizer, each in zip(searched, losses, strict=True)
    ]


def entry(text, *args, **settings):
    """Results of a variant with these losses."""
    found = tries(text, *args, **settings)
    return Entry.of(text, found, choose(found), STEPS)


def cells(table):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]


ADAMW = entry("adamw", [(4.0, 4.2), (3.0, 3.2), (3.3, None)], seconds=2.0)
SUBTRACK = entry("subtrack", [(2.9, 3.1), (3.5, 3.5), (5.0, 5.0)])
LOST = entry("muon", [(None, None), (None, 3.0)])


def test_the_first_table_has_the_best_of_each_by_loss():
    table = cells(report.results_table([SUBTRACK, ADAMW, LOST]))
    assert table[0][:4] == ["optimizer", "held-out loss", "seeds", "learning rate"]
    # 5 + 8 + 3 seconds, and 5 + 9 x 2; the least rate that was tried has its mark.
    assert table[2:4] == [
        ["subtrack", "3.000 ± 0.141", "2", "0.1*", "1", "3", "16", "2.50"],
        ["adamw", "3.100 ± 0.141", "2", "0.2", "1", "3", "23", "2.50"],
    ]
    assert table[4][:3] == ["muon", "diverged (2 of 2)", "2"]


def test_the_grid_has_every_try():
    twice = entry("galore", [(3.0,), (2.0,), (2.5,), (4.0,)], scales=(0.25, 1.0))
    assert cells(report.grid_table([twice, ADAMW]))[2:] == [
        ["galore", "0.25", "3.000", "2.500", ""],
        ["galore", "1", "**2.000**", "4.000", ""],
        ["adamw", "1", "4.100 ± 0.141", "**3.100 ± 0.141**", "diverged (1 of 2)"],
    ]


@pytest.mark.parametrize(("rate", "mark"), [(0.1, "*"), (0.2, ""), (0.3, "*")])
def test_the_edges_of_the_grid_are_marked(rate, mark):
    losses = [(2.0,) if k == round(rate * 10) else (3.0,) for k in (1, 2, 3)]
    row = cells(report.results_table([entry("adamw", losses)]))[2]
    assert row[3] == f"{rate:g}{mark}"
    assert row[1] == "2.000"


def test_what_to_extend_is_said_where_there_is_a_mark():
    inside, swept = entry("adamw", [(3.0,), (2.0,), (3.0,)]), SUBTRACK
    assert "\\*" not in report.notes([inside], [inside])
    notes = report.notes([inside], [inside, swept])
    (line,) = [x for x in notes.splitlines() if "\\*" in x]
    assert line.endswith("the best may lie beyond: extend --learning-rates.")
    both = entry("adamw", [(2.0,), (3.0,), (3.0,), (3.0,)], scales=(0.25, 1.0))
    assert "extend --learning-rates and --matrix-scales." in report.notes(
        [both], [both]
    )


def test_notes_say_how_rates_were_chosen():
    fixed = entry("adamw:learning_rate=1", [(3.0,)])
    entries = [ADAMW, fixed]
    assert "searched" not in report.notes(entries, entries)
    notes = report.notes(entries, entries, tuning_seeds=(3, 5))
    assert "at the rates of the least mean on seeds 3, 5. " in notes
    assert "on seeds 3, 5 alone, with 1 to 3 tries for each method; other" in notes


def test_sweeps_show_methods_without_the_setting_as_they_are():
    variants = [
        parse_variant(name, BASE, [1.0], [1.0]) for name in ("adamw", "subtrack")
    ]
    sweep = parse_sweep("rank=2,4", variants)
    swept = dataclasses.replace(SUBTRACK, optimizer="subtrack rank=4")
    table = cells(report.sweep_table(sweep, [ADAMW, swept]))
    assert table[0] == ["optimizer, by rank", "2", "4"]
    assert table[2:] == [
        ["adamw", "3.100 ± 0.141", "3.100 ± 0.141"],
        ["subtrack", "-", "3.000 ± 0.141*"],
    ]


def test_diverged_losses_are_none_as_json_has_no_infinity():
    assert SUBTRACK.best.losses == [2.9, 3.1]
    assert SUBTRACK.seconds == 16
    assert LOST.best.mean is None
    assert LOST.best.losses == [None, None]
    assert LOST.best.order > ADAMW.best.order > SUBTRACK.best.order


def test_the_plot_has_lines_bands_and_a_legend_by_loss():
    figure = report.plot([SUBTRACK, ADAMW, LOST], "title")
    by_steps, by_seconds = figure.axes
    lines = {line.get_label().split(":")[0]: line for line in by_steps.lines}
    assert list(lines) == ["subtrack", "adamw", "muon"]
    assert list(lines["adamw"].get_xdata()) == [2, 4]
    assert list(lines["adamw"].get_ydata()) == pytest.approx([9.0, 3.1])
    assert list(by_seconds.lines[1].get_xdata()) == [5 + 2, 5 + 3 * 2]
    band = by_steps.collections[1].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((3.0, 9.0))
    legend = [text.get_text() for text in by_seconds.get_legend().get_texts()]
    assert legend == [
        "subtrack: 3.000 ± 0.141",
        "adamw: 3.100 ± 0.141",
        "muon: diverged (2 of 2)",
    ]
    assert not math.isnan(by_steps.get_ylim()[0])


@pytest.mark.parametrize("name", ["compare-9m", "sensitivity-9m"])
def test_published_results_give_their_published_tables(name):
    directory = pathlib.Path(report.__file__).parents[1] / "results"
    results = json.loads((directory / f"{name}.json").read_text())
    published = (directory / f"{name}.md").read_text().split("\n\n")

    def entries(found):
        values = [each | {"curve": []} for each in found]
        return pydantic.TypeAdapter(list[Entry]).validate_python(values)

    main = entries(results["optimizers"])
    swept = {name: entries(found) for name, found in results["sweeps"].items()}
    assert published[1] == report.results_table(main)
    assert published[2] == report.notes(main, main, results["tuning_seeds"])
    assert published[4].strip() == report.grid_table(main)
    variants = [parse_variant(each.optimizer, BASE, [1.0], [1.0]) for each in main]
    tables = [each.strip() for each in published[6::2]]
    for table, (setting, found) in zip(tables, swept.items(), strict=True):
        head = cells(table)[0]
        sweep = parse_sweep(f"{setting}={','.join(head[1:])}", variants)
        assert table == report.sweep_table(sweep, [*main, *found])
