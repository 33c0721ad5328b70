"""The directory of a run and what is written there."""

import json
import time

import numpy as np
import pytest

from train import metrics


def test_a_directory_with_a_run_is_left_alone(tmp_path):
    wanted = tmp_path / "runs" / "mine"
    first = metrics.create_run_directory(wanted)
    (first / metrics.METRICS_FILE).write_text("precious")
    second = metrics.create_run_directory(wanted)
    third = metrics.create_run_directory(wanted)
    assert [path.name for path in (first, second, third)] == [
        "mine",
        "mine-2",
        "mine-3",
    ]
    assert (first / metrics.METRICS_FILE).read_text() == "precious"


def test_a_directory_without_a_run_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert metrics.create_run_directory(tmp_path) == tmp_path
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to --output-dir .*file/run"):
        metrics.create_run_directory(tmp_path / "file" / "run")


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(step=1, loss=np.float32(2.5))
    path = tmp_path / metrics.METRICS_FILE
    assert json.loads(path.read_text()) == {"step": 1, "loss": 2.5}
    writer.write(step=2, loss=np.float32(2.25), eval_loss=2.125)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == writer.rows
    assert rows[1] == {"step": 2, "loss": 2.25, "eval_loss": 2.125}
    assert isinstance(rows[1]["step"], int)


def test_pauses_do_not_count(monkeypatch):
    clock = iter([0.0, 5.0, 105.0, 107.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = metrics.Stopwatch()
    with watch.pause():
        pass
    assert watch.lap() == 7.0
    assert watch.lap() == 3.0


def test_curve_is_a_picture_even_of_a_run_cut_short(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}]
    for count in range(3):
        path = tmp_path / f"{count}.png"
        metrics.plot_curve(rows[:count], "a run", path)
        assert path.read_bytes().startswith(b"\x89PNG")
