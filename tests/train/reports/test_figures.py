"""Content of figures before they are saved as PNG."""

import math

import numpy as np
import pytest

from train.reports import loss_plot, subspace_plot
from train.system import files
from train.timing import benchmark_report


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a figure and returns it, or None if no file is written."""
    figures = []
    write = files.write_figure

    def keep(path, figure, **options):
        write(path, figure, **options)
        figures.append(figure)

    for module in (benchmark_report, loss_plot, subspace_plot):
        monkeypatch.setattr(module, "write_figure", keep)

    def draw(plot, *args):
        figures.clear()
        plot(*args, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").exists() == bool(figures)
        return figures[0] if figures else None

    return draw


def visible_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_ticklocs() if low <= tick <= high]


def cost(seconds, size):
    times = {"steady_seconds": [seconds] * 2, "refresh_seconds": [seconds] * 2}
    return benchmark_report.Cost([1.0], 1, 1, size, **times)


@pytest.mark.parametrize(
    "ratios",
    [
        [1.0, 0.99, 1.004, 45.7, 0.89],
        [1.0, 0.75, 0.82],
        [1.0, 1.2, 1.01],
        [1.0],
        [1.0, 0.003, 1200.0],
    ],
)
def test_bars_end_in_numbers_that_are_clear_of_the_line_at_1(drawn, ratios):
    costs = {f"method-{k}": cost(r, round(1e6 * r)) for k, r in enumerate(ratios)}
    figure = drawn(benchmark_report.plot, costs, 10, "title")
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert len(visible_ticks(axes.xaxis)) >= 3
        assert 1 in np.round(visible_ticks(axes.xaxis), 9)
        line = axes.transData.transform((1, 0))[0]
        assert [text.get_text() for text in axes.texts] == [f"{r:.2f}" for r in ratios]
        for text, bar in zip(axes.texts, axes.patches, strict=True):
            box, own = text.get_window_extent(), bar.get_window_extent()
            assert box.x1 < line - 1 or box.x0 > line + 1
            assert box.x1 < own.x0 or box.x0 > own.x1
            assert axes.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1


def look(step, layer, matrix="up", **values):
    return {"step": step, "layer": layer, "matrix": matrix} | values


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("steps", [[1], [1, 2], [10, 20, 30]])
def test_steps_and_layers_are_whole_numbers(drawn, steps, layers):
    rows = [
        look(step, layer, captured_energy=0.5 + 0.1 * layer, recovery_ratio=0.1 * step)
        for step in steps
        for layer in range(layers)
    ]
    figure = drawn(subspace_plot.plot, rows, "title")
    assert len(figure.axes) == 4
    assert [axes.get_xlabel() for axes in figure.axes] == [
        *["step"] * 2,
        *["layer"] * 2,
    ]
    for axes in figure.axes:
        ticks = visible_ticks(axes.xaxis)
        assert ticks and all(tick == round(tick) for tick in ticks)
        assert any(np.isfinite(line.get_ydata()).any() for line in axes.lines)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"captured_energy": 0.5, "grassmann_distance": math.nan}, 1),
        ({"grassmann_distance": math.inf, "recovery_ratio": 0.0}, 1),
        ({"captured_energy": 0.5, "grassmann_distance": 0.0, "recovery_ratio": 2.0}, 3),
    ],
)
def test_no_panel_is_empty(drawn, values, count):
    figure = drawn(subspace_plot.plot, [look(1, 0, **values)], "title")
    assert len(figure.axes) == 2 * count
    for axes in figure.axes:
        (line,) = axes.lines
        inside = axes.bbox.contains(*axes.transData.transform(line.get_xydata())[0])
        assert inside


def test_nothing_to_see_is_no_picture(drawn):
    assert drawn(subspace_plot.plot, [look(1, 0, captured_energy=math.nan)], "") is None
    assert drawn(subspace_plot.plot, [look(1, 0)], "") is None


def test_the_curve_begins_before_training(drawn):
    rows = [{"step": 0, "eval_loss": 7.7}, {"step": 1, "loss": 7.5}]
    rows += [{"step": 2, "loss": 7.0, "eval_loss": 7.1}]
    (axes,) = drawn(loss_plot.plot, rows, "title").axes
    trained, held_out = axes.lines
    assert trained.get_xydata().tolist() == [[1, 7.5], [2, 7.0]]
    assert held_out.get_xydata().tolist() == [[0, 7.7], [2, 7.1]]
    assert visible_ticks(axes.xaxis) == [0, 1, 2]
