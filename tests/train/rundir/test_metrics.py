"""Metrics of each step: JSON lines, TensorBoard, Weights & Biases."""

import dataclasses
import json
import math
import struct
import sys
import time
import types

import numpy as np
import pytest

from tests.train.program import limited_file_size, read_rows
from train.config.presets import PRESETS
from train.config.run_config import ReportConfig
from train.reports import loss_plot
from train.rundir import services
from train.rundir.metrics import METRICS_FILE, MetricsWriter
from train.system.stopwatch import Stopwatch


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(PRESETS["tiny"], output_dir=tmp_path)


def reporting(config, **settings):
    return dataclasses.replace(config, report=ReportConfig(**settings))


def write_steps(config, last_step, steps):
    """A process that resumes after `last_step`."""
    writer = MetricsWriter(config, last_step)
    for step in steps:
        writer.write(step, loss=np.float32(step / 2), eval_loss=1.5)
    writer.close()
    return writer.rows


def test_a_line_is_on_disk_when_write_returns(config, tmp_path):
    writer = MetricsWriter(config, 0)
    row = writer.write(step=1, loss=np.float32(2.5))
    path = tmp_path / METRICS_FILE
    assert json.loads(path.read_text()) == row == {"step": 1, "loss": 2.5}
    writer.write(step=2, loss=np.float32(2.25), eval_loss=2.125, count=np.int32(3))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == writer.rows
    assert rows[1] == {"step": 2, "loss": 2.25, "eval_loss": 2.125, "count": 3}
    assert isinstance(rows[1]["step"], int)
    assert isinstance(rows[1]["count"], int)


def test_rows_of_steps_that_are_taken_again_are_moved(config, tmp_path, capsys):
    """Dropped rows are appended to one file, also by later resumes."""
    path, dropped = tmp_path / METRICS_FILE, tmp_path / "metrics.dropped.jsonl"
    write_steps(config, 0, range(1, 9))
    before = path.read_bytes().splitlines(keepends=True)
    rows = write_steps(config, 5, range(6, 8))
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert read_rows(path) == rows
    assert dropped.read_bytes() == b"".join(before[5:])
    assert capsys.readouterr().err == (
        f"warning: {path}: moved 3 rows of steps after 5, which are repeated, to "
        f"{dropped}\n"
    )
    write_steps(config, 6, [])
    assert dropped.read_bytes() == b"".join([*before[5:], before[6]])
    assert MetricsWriter(config, 0).rows == []
    assert path.read_bytes() == b""
    assert dropped.read_bytes() == b"".join([*before[5:], before[6], *before[:6]])


def test_what_was_measured_before_a_new_run_is_moved_too(config, tmp_path):
    write_steps(config, 0, [0, 1])
    assert MetricsWriter(config, 1).rows[0]["step"] == 0
    assert MetricsWriter(config, 0).rows == []
    assert len(read_rows(tmp_path / "metrics.dropped.jsonl")) == 2


STRANGE = {
    "damaged": b'{"step": 2, "lo\x00\x00',
    "cut short": b'{"step": 2',
    "not UTF-8": b'{"step": 2, "loss": 1.0, "note": "\xff\xfe"}',
    "without a step": b'{"loss": 1.0}',
    "an unknown step": b'{"step": null, "loss": 1.0}',
    "a text for a step": b'{"step": "2", "loss": 1.0}',
    "a fraction for a step": b'{"step": 2.0, "loss": 1.0}',
    "true for a step": b'{"step": true, "loss": 1.0}',
    "a negative step": b'{"step": -2, "loss": 1.0}',
    "a text for a loss": b'{"step": 2, "loss": "low"}',
    "a list for a loss": b'{"step": 2, "loss": [1.0]}',
    "without a loss": b'{"step": 2, "colour": 3}',
    "an array": b'[{"step": 2, "loss": 1.0}]',
    "a number": b"7",
    "a word": b"null",
    "deep": b"[" * 100_000,
    "long": b"9" * 5_000,
}


@pytest.mark.parametrize("line", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_lines_that_are_no_rows_take_no_others_with_them(
    config, tmp_path, capsys, line, position
):
    path, dropped = tmp_path / METRICS_FILE, tmp_path / "metrics.dropped.jsonl"
    dropped.write_bytes(b'{"step": 9, "cut sho')
    write_steps(config, 0, range(1, 5))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:position], line, *lines[position:]]))
    rows = write_steps(config, 4, [5])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert path.read_bytes().splitlines()[:4] == lines
    assert read_rows(path) == rows
    assert dropped.read_bytes() == b'{"step": 9, "cut sho\n' + line + b"\n"
    told = capsys.readouterr().err
    assert told == f"warning: {path}: moved 1 invalid line, to {dropped}\n"


def test_rows_that_are_lost_are_told(config, tmp_path, capsys):
    write_steps(config, 0, range(1, 9))
    path = tmp_path / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    # One row is out of order, one is a duplicate.
    path.write_bytes(b"".join([lines[7], *lines[:3], lines[2]]))
    rows = write_steps(config, 8, [9])
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 8, 9]
    assert read_rows(path) == rows
    assert f"{path} lacks the rows of 4 of the first 8 steps" in capsys.readouterr().err


def test_a_file_that_is_as_it_should_be_is_not_written(config, tmp_path, capsys):
    write_steps(config, 0, range(1, 9))
    before = (tmp_path / METRICS_FILE).stat().st_ino
    assert len(MetricsWriter(config, 8).rows) == 8
    assert (tmp_path / METRICS_FILE).stat().st_ino == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_is_null_there_and_nan_again(config, tmp_path, value):
    MetricsWriter(config, 0).write(1, loss=np.float32(value), norm=2.0)
    path = tmp_path / METRICS_FILE
    assert path.read_text() == '{"step": 1, "loss": null, "norm": 2.0}\n'
    (row,) = MetricsWriter(config, 1).rows
    assert math.isnan(row["loss"]) and row["norm"] == 2.0
    assert path.read_text() == '{"step": 1, "loss": null, "norm": 2.0}\n'


def fields_of(message):
    """Fields of a protocol buffer: (number, value)."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[position : position + size]
        position += size


def read_events(path):
    """TensorBoard's rows: (step, {tag: value}), or (step, None) for a session start."""
    content, position = path.read_bytes(), 0
    while position < len(content):
        (size,) = struct.unpack_from("<Q", content, position)
        event = dict(fields_of(content[position + 12 : position + 12 + size]))
        position += size + 16
        step = event.get(2, 0)
        if 7 in event:  # a session log with status START, which hides earlier rows
            assert dict(fields_of(event[7]))[1] == 1
            yield step, None
        for _, value in fields_of(event.get(5, b"")):
            parts = dict(fields_of(value))
            yield step, {parts[1].decode(): struct.unpack("<f", parts[2])[0]}


def test_tensorboard_gets_every_number_and_hides_steps_taken_again(config, tmp_path):
    config = reporting(config, tensorboard=True)
    write_steps(config, 0, [1, 2, 3])
    write_steps(config, 2, [3, 4])
    first, resumed = (
        list(read_events(path)) for path in sorted((tmp_path / "tensorboard").iterdir())
    )
    assert first == [
        (1, None),
        *[(1, {"loss": 0.5}), (1, {"eval_loss": 1.5})],
        *[(2, {"loss": 1.0}), (2, {"eval_loss": 1.5})],
        *[(3, {"loss": 1.5}), (3, {"eval_loss": 1.5})],
    ]
    assert resumed == [
        (3, None),
        *[(3, {"loss": 1.5}), (3, {"eval_loss": 1.5})],
        *[(4, {"loss": 2.0}), (4, {"eval_loss": 1.5})],
    ]


def test_tensorboard_on_a_full_disk_is_an_error(config, tmp_path):
    """The package's own writer would wait forever."""
    board = services._TensorBoard(reporting(config, tensorboard=True), 0)
    message = f"cannot write {tmp_path / 'tensorboard'}: File too large"
    with limited_file_size(1000), pytest.raises(OSError, match=message):
        for step in range(1000):
            board.write(step, {"loss": 1.0})


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package; records all calls."""
    fake = types.ModuleType("wandb")
    fake.begun, fake.logged, fake.finished = [], [], 0
    fake.Error = type("Error", (Exception,), {})

    class Run:
        def log(self, values, step):
            fake.logged.append((step, values))

        def finish(self):
            fake.finished += 1

    def init(**settings):
        fake.begun.append(settings)
        return Run()

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_every_row(config, wandb):
    config = reporting(config, wandb=True, wandb_project="whales")
    services.check_packages(config)
    write_steps(config, 0, [1, 2])
    (begun,) = wandb.begun
    assert begun["project"] == "whales"
    assert begun["name"] == config.output_dir.name
    assert begun["allow_val_change"]  # a resumed run may have other settings
    assert begun["config"]["optimizer"]["rank"] == config.optimizer.rank
    assert wandb.logged == [
        (1, {"loss": 0.5, "eval_loss": 1.5}),
        (2, {"loss": 1.0, "eval_loss": 1.5}),
    ]
    assert wandb.finished == 1


def test_weights_and_biases_goes_on_with_a_run_and_mixes_no_two(
    config, wandb, tmp_path
):
    config = reporting(config, wandb=True)
    write_steps(config, 0, [1, 2])
    write_steps(config, 2, [3])
    # Another run in a directory of the same name, after the first was deleted.
    for path in tmp_path.iterdir():
        path.unlink()
    write_steps(config, 0, [1])
    first, resumed, other = (begun["id"] for begun in wandb.begun)
    assert first == resumed != other
    assert len(first) >= 8
    assert all(begun["resume"] == "allow" for begun in wandb.begun)


@pytest.mark.parametrize("content", [b"", b" \n", b"a b", b"../x", b"\xff" * 9])
def test_an_id_that_is_damaged_begins_no_other_run(config, wandb, tmp_path, content):
    config = reporting(config, wandb=True)
    path = tmp_path / services.WANDB_ID_FILE
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"{path} holds no id of a run .*: delete it"):
        MetricsWriter(config, 2)
    assert path.read_bytes() == content
    assert not wandb.begun


def test_an_id_that_is_lost_is_told(config, wandb, tmp_path, capsys):
    config = reporting(config, wandb=True)
    write_steps(config, 0, [1, 2])
    assert capsys.readouterr().err == ""
    (tmp_path / services.WANDB_ID_FILE).write_text(f"{wandb.begun[0]['id']}\n")
    write_steps(config, 2, [3])
    assert wandb.begun[0]["id"] == wandb.begun[1]["id"]
    (tmp_path / services.WANDB_ID_FILE).unlink()
    write_steps(config, 3, [4])
    assert (
        "has no wandb-id.txt: the steps after 3 go to a new" in capsys.readouterr().err
    )


def test_weights_and_biases_that_refuses_is_an_error_of_its_own(config, wandb):
    def init(**settings):
        raise wandb.Error("api_key not configured")

    wandb.init = init
    with pytest.raises(OSError, match="--wandb: api_key not configured"):
        MetricsWriter(reporting(config, wandb=True), 0)


def test_weights_and_biases_is_an_extra_that_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    services.check_packages(config)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[wandb\]'"):
        services.check_packages(reporting(config, wandb=True))


def test_nobody_is_told_unless_asked(config, monkeypatch, tmp_path):
    for package in ("wandb", "tensorboardX"):
        monkeypatch.setitem(sys.modules, package, None)
    write_steps(config, 0, [1])
    assert list(tmp_path.iterdir()) == [tmp_path / METRICS_FILE]


def test_pauses_do_not_count(monkeypatch):
    clock = iter([0.0, 5.0, 105.0, 107.0, 110.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.pause():
        pass
    assert watch.lap() == 7.0
    assert watch.lap() == 3.0


def test_curve_is_a_picture_even_of_a_run_cut_short(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}]
    rows += [{"step": 3, "loss": math.nan, "eval_loss": math.nan}]
    for count in range(4):
        path = tmp_path / f"{count}.png"
        loss_plot.plot(rows[:count], "a run", path)
        assert path.read_bytes().startswith(b"\x89PNG")
