"""The best checkpoint, by held-out loss: kept, found, and safe from damage."""

import math
import shutil

import pytest

from tests.train.rundir.test_checkpoints import (
    abstract,
    make_batches,
    make_state,
    steps_in,
    truncate,
)
from train.config.run_config import CheckpointChoice, CheckpointConfig
from train.rundir.best_checkpoint import METRICS
from train.rundir.checkpoint_reading import restore_params
from train.rundir.checkpoints import CHECKPOINTS, Checkpoints

# Lowest at step 20; step 40 is saved without an evaluation.
LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.0, 60: math.nan}


def save_losses(directory, losses, **settings):
    with Checkpoints(directory, CheckpointConfig(**settings)) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, make_state(step), make_batches(), loss)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    save_losses(directory, LOSSES)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def read(directory, **choice):
    """Returns the step that is restored, and the reports."""
    reports = []
    target = abstract(make_state().params)
    restored = restore_params(
        directory, target, CheckpointChoice(**choice), reports.append
    )
    return restored.step, reports


def test_the_best_is_kept_beside_the_newest(saved, tmp_path):
    assert steps_in(saved) == [20, 50, 60]
    save_losses(tmp_path, LOSSES, keep_best=False)
    assert steps_in(tmp_path) == [50, 60]


def test_a_resumed_run_keeps_the_best_until_there_is_a_better_one(copy):
    save_losses(copy, {70: 2.1, 80: 3.0})
    assert steps_in(copy) == [20, 70, 80]
    save_losses(copy, {90: 1.9, 100: None, 110: None})
    assert steps_in(copy) == [90, 100, 110]


def test_an_evaluation_is_the_best_if_lower_than_all_checkpoints(copy, tmp_path):
    expected = {1.9: True, 2.0: False, 2.1: False, math.nan: False, None: False}
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        assert {x: checkpoints.is_best(x) for x in expected} == expected
        checkpoints.save(70, make_state(70), make_batches(), 1.9)
        assert not checkpoints.is_best(1.95)
    with Checkpoints(tmp_path / "new", CheckpointConfig()) as checkpoints:
        assert checkpoints.is_best(9.0)
        assert not checkpoints.is_best(math.inf)
    with Checkpoints(copy, CheckpointConfig(keep_best=False)) as checkpoints:
        assert not checkpoints.is_best(1.0)


@pytest.mark.parametrize(
    ("choice", "step"),
    [({}, 20), ({"which": "best"}, 20), ({"which": "newest"}, 60), ({"step": 50}, 50)],
)
def test_the_chosen_checkpoint_is_read(saved, choice, step):
    assert read(saved, **choice) == (step, [])


def test_checkpoints_without_held_out_losses_are_read_by_age(tmp_path):
    save_losses(tmp_path, {1: None, 2: None})
    assert read(tmp_path) == read(tmp_path, which="newest") == (2, [])
    with pytest.raises(ValueError, match="no checkpoint has a held-out loss"):
        read(tmp_path, which="best")


def test_a_step_without_a_checkpoint_is_an_error_that_lists_them(saved):
    with pytest.raises(ValueError, match=r"--step 30: .*; there are 20, 50, 60"):
        read(saved, step=30)


def test_two_choices_exclude_each_other():
    with pytest.raises(ValueError, match="--which best and --step 5 exclude"):
        CheckpointChoice("best", 5)
    with pytest.raises(ValueError, match="--step must be at least 0"):
        CheckpointChoice(step=-1)


def test_a_damaged_best_checkpoint_is_reported_and_the_next_best_read(copy):
    truncate(copy / CHECKPOINTS / "20" / "check" / "metadata")
    step, (report,) = read(copy)
    assert step == 50
    assert "the checkpoint of step 20 in " in report
    assert report.endswith("; the one of step 50 is used")
    assert steps_in(copy) == [20, 50, 60]


def flip_digit(path):
    path.write_text(path.read_text().replace("2.0", "9.0"))


@pytest.mark.parametrize("damage", [truncate, flip_digit])
def test_a_damaged_held_out_loss_is_reported_and_its_checkpoint_kept(copy, damage):
    damage(copy / CHECKPOINTS / "20" / METRICS / METRICS)
    step, (report,) = read(copy)
    assert step == 50
    assert "the held-out loss of the checkpoint of step 20 is damaged" in report
    assert read(copy, step=20) == (20, [])
    reports = []
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        target = abstract(make_state())
        state = checkpoints.restore(target, make_batches(), reports.append)
        assert int(state.step) == 60
        assert reports == [report]
        for later in (70, 80):
            checkpoints.save(later, make_state(later), make_batches())
    assert steps_in(copy) == [20, 50, 70, 80]


def test_losses_of_another_text_are_forgotten(copy):
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        checkpoints.forget_losses()
        assert checkpoints.is_best(8.0)
        checkpoints.save(70, make_state(70), make_batches(), 8.0)
        checkpoints.save(80, make_state(80), make_batches())
        checkpoints.save(90, make_state(90), make_batches())
    assert steps_in(copy) == [70, 80, 90]
    assert read(copy) == (70, [])
