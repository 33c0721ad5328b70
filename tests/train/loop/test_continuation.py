"""Messages of a run that is resumed with other settings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from models.llama import LlamaConfig
from tests.train.data.test_dataset import (
    describe,
    lines,
    open_text,
    tokenizer_directory,
)
from tests.train.rundir.test_directory import TINY, changed
from train.loop import continuation
from train.rundir import state_changes
from train.rundir.directory import Found
from train.step.train_state import TrainState

__all__ = ["lines", "tokenizer_directory"]

SMALL = changed(model=LlamaConfig(64, 32, 48, num_layers=2, num_heads=2))


class Saved:
    """Stands in for checkpoints; returns the position that it was given."""

    def __init__(self, position):
        self.position = position

    def restore(self, abstract, batches, **options):
        batches.set_state(self.position)
        return abstract


@pytest.fixture
def open_lines(lines, tokenizer_directory):
    def opened(**values):
        config = dataclasses.replace(describe(data_glob=str(lines)), **values)
        return open_text(config, tokenizer_directory=tokenizer_directory)

    return opened


def restore(text, position, **changes):
    found = Found(changes, False) if changes else None
    return continuation.restore(Saved(position), "state", text.train_batches, found)


@pytest.mark.parametrize(("size", "skipped"), [(4, 3), (6, 2), (3, 4), (5, 2), (16, 0)])
def test_batches_of_another_size_go_on_with_the_first_row_not_read(
    open_lines, size, skipped
):
    before = open_lines().train_batches()
    for _ in range(3):
        next(before)
    text = open_lines(batch_size_sequences=size)
    change = {} if size == 4 else {"data.batch_size_sequences": (4, size)}
    state, batches = restore(text, before.get_state(), **change)
    assert state == "state"
    expected = text.train_batches()
    for _ in range(skipped):
        next(expected)
    for _ in range(20):
        np.testing.assert_equal(next(batches), next(expected))
    for each in (before, batches, expected):
        each.close()


def test_other_rows_are_read_from_their_beginning(open_lines):
    found = Found({"seed": (0, 1)}, True)
    text = open_lines()
    _, batches = continuation.restore(
        Saved({"any": "position"}), 1, text.train_batches, found
    )
    np.testing.assert_equal(next(batches), next(text.train_batches()))
    batches.close()


def test_a_position_in_a_stream_does_not_depend_on_the_size_of_batches():
    class Stream:
        def train_batches(self):
            return self

        def set_state(self, state):
            self.state = state

        def get_state(self):
            return self.state

    _, batches = restore(
        Stream(), {"taken": 9}, **{"data.batch_size_sequences": [4, 2]}
    )
    assert batches.get_state() == {"taken": 9}


@pytest.mark.parametrize(
    ("settings", "guilty"),
    [
        ({}, []),
        ({"learning_rate": 1.0, "b2": 0.5, "weight_decay": 0.1, "damping": 0.5}, []),
        ({"update_interval": 3, "scale": 2.0, "name": "grass-walk"}, []),
        ({"rank": 4, "b2": 0.5}, ["rank"]),
        ({"mu_dtype": "bfloat16"}, ["mu_dtype"]),
        ({"rank": 4000, "b2": 0.5}, ["rank"]),
        ({"name": "adamw", "b2": 0.5}, ["name"]),
        ({"matrix_learning_rate_scale": 2.0, "rank": 4}, None),
    ],
)
def test_settings_that_change_the_state_of_the_optimizer(settings, guilty):
    saved = changed(SMALL, optimizer={"rank": 8})
    config = changed(saved, optimizer=settings)
    if guilty is None:
        guilty = ["matrix_learning_rate_scale", "rank"]
    found = state_changes.settings_of_state(config, saved)
    assert sorted(found) == [f"optimizer.{name}" for name in guilty]


def test_changes_are_told_with_what_the_schedule_does():
    config = changed(TINY, steps=600)
    changes = {"steps": (300, 600), "output_dir": ("a", "b"), "seed": (0, 1)}
    state = TrainState(jnp.int32(307), jnp.int32(7), {}, ())
    told = continuation.describe(config, Found(changes, True), state).splitlines()
    assert told[:2] == [
        "Changed    --steps from 300 to 600",
        "Changed    --seed from 0 to 1",
    ]
    # A peak of 3e-3 after 60 steps, and a cosine to a tenth of it.
    angle = np.pi * (300 - 60) / (600 - 60)
    rate = 3e-3 * (0.1 + 0.9 * (1 + np.cos(angle)) / 2)
    assert "is now that of 600 steps" in told[2]
    assert f"step 308 is {rate:.3g}; with 300 steps it would be 0.0003" in told[2]
    assert "read from its beginning" in told[3]
    told = continuation.describe(config, Found({}, False, True), state)
    assert "Held-out losses are of another text from now on" in told
    assert continuation.describe(config, Found({}, False), state) == ""
    # A run of 300 steps cannot have this warm-up.
    config = changed(config, optimizer={"warmup_steps": 500})
    changes = {"steps": (300, 600), "optimizer.warmup_steps": (None, 500)}
    told = continuation.describe(config, Found(changes, False), state)
    assert told.endswith(f"step 308 is {3e-3 * 301 / 501:.3g}")
