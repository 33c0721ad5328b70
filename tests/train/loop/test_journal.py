"""Journal of a run: progress, rows, early end on errors."""

import dataclasses
import json
import math
import os
import time

import jax.numpy as jnp
import pytest

from train.config.presets import PRESETS
from train.loop import journal
from train.loop.journal import DivergedError
from train.reports import loss_plot
from train.rundir import services
from train.rundir.metrics import CURVE_FILE, METRICS_FILE
from train.step import throughput


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(
        PRESETS["tiny"], output_dir=tmp_path, max_skipped_steps_in_a_row=3
    )


def Journal(config, first):
    counted = throughput.tokens(config.model, config.data)
    return journal.Journal(config, first, counted)


def values(skipped_steps=0, loss=2.0, count=100, **more):
    numbers = {"skipped_steps": skipped_steps, "count": count}
    integers = {name: jnp.int32(number) for name, number in numbers.items()}
    return {"loss": jnp.float32(loss)} | integers | more


def record_all(journal, skipped, first=1):
    """`skipped` marks skipped steps; returns the last recorded row."""
    total = journal.rows[-1]["skipped_steps"] if journal.rows else 0
    for step, is_skipped in enumerate(skipped, first):
        total += is_skipped
        loss = math.nan if is_skipped else 2.0
        journal.record(step, values(total, loss))


def read_steps(config):
    lines = (config.output_dir / METRICS_FILE).read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_step_is_written_down_with_its_rates(config, capsys):
    config = dataclasses.replace(
        config, report=dataclasses.replace(config.report, peak_teraflops=1.0)
    )
    with Journal(config, 0) as journal:
        journal.record(1, values(eval_loss=1.25, gradient_norm=jnp.float32(0.5)))
        (row,) = journal.rows
    assert row["step"] == 1
    assert (row["loss"], row["eval_loss"], row["gradient_norm"]) == (2.0, 1.25, 0.5)
    assert row["tokens_per_second"] > 0
    flops = row["tokens_per_second"] * throughput.flops_per_token(config.model, 128)
    assert row["mfu"] == pytest.approx(flops / throughput.peak_flops(1.0))
    assert row["peak_memory_bytes"] > 2**20
    shown = capsys.readouterr()
    assert "step 1: held-out loss 1.250" in shown.out + shown.err
    assert f"1/{config.steps}" in shown.err
    assert "loss=2.000" in shown.err
    assert (config.output_dir / CURVE_FILE).exists()


def test_the_loss_before_training_is_that_of_the_run_that_begins(config):
    for loss in (5.5, 4.5):
        with Journal(config, 0) as journal:
            journal.begin(eval_loss=loss)
    record_all(journal, [0, 1])
    with Journal(config, 2) as journal:
        before, *_ = journal.rows
        record_all(journal, [0], first=3)
    assert read_steps(config) == [0, 1, 2, 3]
    assert (before["eval_loss"], before["tokens"], before["skipped_steps"]) == (
        4.5,
        0,
        0,
    )
    assert [row["skipped_steps"] for row in journal.rows] == [0, 0, 1, 1]


def test_a_device_of_unknown_speed_has_no_mfu(config):
    with Journal(config, 0) as journal:
        journal.record(1, values())
    assert "mfu" not in journal.rows[0]


def test_as_many_skipped_steps_in_a_row_as_allowed_end_a_run(config):
    with Journal(config, 0) as journal:
        record_all(journal, [0, 1, 1])
        with pytest.raises(DivergedError, match="the last 3 steps, to step 4,"):
            record_all(journal, [1], first=4)
    assert read_steps(config) == [1, 2, 3, 4]


def test_a_good_step_between_skipped_ones_begins_the_count_anew(config):
    with Journal(config, 0) as journal:
        record_all(journal, [1, 1, 0, 1, 1, 0, 0, 1, 1, 0])
        assert journal.rows[-1]["skipped_steps"] == 6
        with pytest.raises(DivergedError):
            record_all(journal, [1, 1, 1], first=11)


@pytest.mark.parametrize(
    ("before", "bearable"),
    [([1, 1, 0], 2), ([0, 1, 1], 0), ([1, 0, 1], 1), ([0, 0, 0], 2)],
)
def test_a_resumed_run_counts_on(config, before, bearable):
    with Journal(config, 0) as journal:
        record_all(journal, before)
    with Journal(config, 3) as journal:
        record_all(journal, [1] * bearable, first=4)
        with pytest.raises(DivergedError):
            record_all(journal, [1], first=4 + bearable)


def test_steps_skipped_long_ago_do_not_end_a_resumed_run(config):
    config = dataclasses.replace(config, max_skipped_steps_in_a_row=1)
    patient = dataclasses.replace(config, max_skipped_steps_in_a_row=9)
    with Journal(patient, 0) as journal:
        record_all(journal, [1, 1, 0])
    with Journal(config, 3) as journal:
        record_all(journal, [0, 0], first=4)


def test_tokens_without_padding_and_seconds_add_up(config, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter(range(0, 1000, 10)).__next__)
    with Journal(config, 0) as journal:  # reads the clock twice
        journal.record(1, values(count=100))
        journal.record(2, values(count=60))
    assert [row["tokens"] for row in journal.rows] == [100, 160]
    assert [row["elapsed_seconds"] for row in journal.rows] == [20, 40]
    assert [row["tokens_per_second"] for row in journal.rows] == [5, 3]


def test_a_resumed_run_adds_to_tokens_and_seconds(config):
    with Journal(config, 0) as journal:
        record_all(journal, [0, 0, 0])
    before = journal.rows[1]["elapsed_seconds"]
    with Journal(config, 2) as journal:
        record_all(journal, [0], first=3)
    assert journal.rows[2]["tokens"] == 300
    assert before < journal.rows[2]["elapsed_seconds"] < before + 60


def test_tokens_of_lost_rows_are_those_of_steps_like_the_others(config):
    path = config.output_dir / METRICS_FILE
    for content, tokens in [
        ('{"step": 2, "loss": 1, "skipped_steps": 0}\n', 4 * 1024),
        ('{"step": 2, "loss": 1, "tokens": 8, "elapsed_seconds": 7.5}\n', 16),
    ]:
        path.write_text(content)
        with Journal(config, 4) as journal:
            journal.record(5, values(count=1))
        assert journal.rows[-1]["tokens"] == tokens + 1
    assert journal.rows[-1]["elapsed_seconds"] >= 7.5


def full_disk(*args, **options):
    raise OSError("No space left on device")


def test_rows_are_kept_when_a_later_one_cannot_be_written(config, monkeypatch):
    class Watcher:
        closed = False

        def write(self, step, row):
            if step == 3:
                full_disk()

        def close(self):
            self.closed = True

    watcher = Watcher()
    monkeypatch.setattr(services, "open_services", lambda *args: [watcher])
    with pytest.raises(OSError, match="No space left"), Journal(config, 0) as journal:
        record_all(journal, [0] * 5)
    assert read_steps(config) == [1, 2, 3]
    assert watcher.closed
    assert (config.output_dir / CURVE_FILE).exists()


def test_a_disk_that_is_full_at_the_end_is_told(config, monkeypatch):
    monkeypatch.setattr(loss_plot, "plot", full_disk)
    with pytest.raises(OSError, match="No space left"), Journal(config, 0) as journal:
        record_all(journal, [0])
    assert read_steps(config) == [1]


def test_what_went_wrong_first_is_what_is_told(config, monkeypatch):
    monkeypatch.setattr(loss_plot, "plot", full_disk)
    with pytest.raises(DivergedError), Journal(config, 0) as journal:
        record_all(journal, [1, 1, 1])


def test_a_broken_terminal_is_left_whole(config, capfd):
    """The progress bar is also closed when the run fails."""
    with pytest.raises(ZeroDivisionError), Journal(config, 0) as journal:
        record_all(journal, [0])
        raise ZeroDivisionError
    assert capfd.readouterr().err.endswith("\n")
    assert os.path.exists(config.output_dir / CURVE_FILE)
