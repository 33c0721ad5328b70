"""Subspace diagnostics of a run: rows, pictures, and resumed runs."""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from tests import common
from tests.train import program
from tests.train.program import assert_pretrain_refuses, read_rows
from train.cli import command_line
from train.config.presets import PRESETS
from train.config.run_config import ReportConfig
from train.loop.subspace_report import (
    DIAGNOSTICS_FILE,
    PLOT_FILE,
    Diagnostics,
    check_has_subspaces,
)
from train.reports import subspace_plot
from train.step import mesh, optimizers
from train.step.train_state import TrainState
from train.system.json_lines import JsonLines
from train.system.stopwatch import Stopwatch

INTERVAL, STEPS = 3, 14
MATRICES = {
    "layers/attention/query/kernel": common.Leaf((2, 6, 10), (1,), (2,)),
    "layers/mlp/down/kernel": common.Leaf((2, 10, 6), (1,), (2,)),
}


# --- Rows -----------------------------------------------------------------------


def configure(directory, name="subtrack", rank=3, **report):
    tiny = PRESETS["tiny"]
    return dataclasses.replace(
        tiny,
        output_dir=directory,
        optimizer=dataclasses.replace(
            tiny.optimizer, name=name, rank=rank, update_interval=INTERVAL
        ),
        report=ReportConfig(**{"diagnostics": True} | report),
    )


def nested(leaves):
    """Nests paths into dictionaries, like the model's parameters."""
    tree = {"norm": jnp.ones(4)}
    for path, leaf in leaves.items():
        *keys, last = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def states_of(config, skipped=()):
    """[(gradients, state)] after each step, preceded by the initial one."""
    optimizer = optimizers.make_optimizer(config.optimizer, 1e-3, seed=0)
    params = nested(common.zeros(MATRICES))
    update = jax.jit(optimizer.update)
    opt_state = optimizer.init(params)
    out = [(None, TrainState(jnp.int32(0), jnp.int32(0), params, opt_state))]
    for step in range(1, STEPS + 1):
        drifting = common.drifting_tree(MATRICES, STEPS)
        gradients = nested(common.at(drifting, step - 1))
        if step not in skipped:
            _, opt_state = update(gradients, opt_state, params)
        count = sum(1 for each in skipped if each <= step)
        state = TrainState(jnp.int32(step), jnp.int32(count), params, opt_state)
        out.append((gradients, state))
    return out


def write(config, states, first=0, last=STEPS, watch=None):
    """Feeds the diagnostics as the training loop does; returns the rows on disk."""
    watch = watch or Stopwatch()
    devices = mesh.make_mesh("fsdp=1", jax.devices()[:1])
    with Diagnostics(config, first, devices) as diagnostics:
        for step in range(first + 1, last + 1):
            # The last step's result is not fetched yet, unless a run resumes from it.
            known = states[max(step - 2, first)][1].skipped_steps
            diagnostics.before(step, states[step - 1][1], int(known))
            diagnostics.after(step, states[step][1], watch)
    return read_rows(config.output_dir / DIAGNOSTICS_FILE)


def test_rows_are_those_of_numpy(tmp_path):
    config = configure(tmp_path)
    states = states_of(config)
    rows = write(config, states)
    assert [(row["step"], row["matrix"], row["layer"]) for row in rows] == [
        (step, matrix, layer)
        for step in (1, 4, 7, 10, 13)
        for matrix in MATRICES
        for layer in range(2)
    ]
    for row in rows:
        gradients, after = states[row["step"]]
        before = states[row["step"] - 1][1]

        def own(tree, row=row):
            for key in row["matrix"].split("/"):
                tree = tree[key]
            return np.asarray(tree, np.float64)[row["layer"]]

        old, new = (
            own(optax.tree.get(state.opt_state, "basis")) for state in (before, after)
        )
        gradient = own(gradients)
        wide = gradient if len(new) == len(gradient) else gradient.T
        energy = np.sum((new.T @ wide) ** 2) / np.sum(wide**2)
        assert row["captured_energy"] == pytest.approx(energy, rel=1e-4)
        recovered = own(optax.tree.get(after.opt_state, "recovery_norm"))
        ratio = recovered / np.linalg.norm(wide)
        assert row["recovery_ratio"] == pytest.approx(ratio, rel=1e-4)
        if row["step"] == 1:
            assert math.isnan(row["grassmann_distance"])
            assert math.isnan(row["largest_angle_radians"])
            continue
        angles = scipy.linalg.subspace_angles(old, new)
        assert row["largest_angle_radians"] == pytest.approx(angles[0], abs=1e-5)
        distance = np.linalg.norm(angles)
        assert row["grassmann_distance"] == pytest.approx(distance, abs=1e-5)
        assert distance > 1e-3
    lines = (tmp_path / DIAGNOSTICS_FILE).read_text().splitlines()
    assert json.loads(lines[0])["grassmann_distance"] is None


@pytest.mark.parametrize(
    ("skipped", "steps"),
    [
        ([], [1, 4, 7, 10, 13]),
        ([2], [1, 5, 8, 11, 14]),  # fetched one step late, without effect
        ([3], [1, 5, 8, 11, 14]),  # not fetched yet at a step that is not due then
        ([4], [1, 5, 8, 11, 14]),  # the step that was due
        ([4, 5], [1, 6, 9, 12]),
        ([1, 2, 9], [3, 6, 10, 13]),
    ],
)
def test_every_move_is_seen_however_many_steps_are_skipped_and_wherever_resumed(
    tmp_path, skipped, steps, monkeypatch
):
    monkeypatch.setattr(subspace_plot, "plot", lambda *args: None)
    config = configure(tmp_path)
    states = states_of(config, skipped)
    rows = write(config, states)
    assert sorted({row["step"] for row in rows}) == steps
    for row in rows:
        assert math.isnan(row["grassmann_distance"]) == (row["step"] == steps[0])
        assert not row["grassmann_distance"] < 1e-3
    want = (tmp_path / DIAGNOSTICS_FILE).read_text()
    for first in range(1, STEPS):
        write(config, states, first)
        assert (tmp_path / DIAGNOSTICS_FILE).read_text() == want


@pytest.mark.parametrize(
    ("every", "steps"), [(1, range(1, STEPS + 1)), (6, [1, 7, 13]), (None, [1, 4, 7])]
)
def test_how_often(tmp_path, every, steps):
    config = configure(tmp_path, diagnostics_every_steps=every)
    last = 9 if every is None else STEPS
    rows = write(config, states_of(config), last=last)
    assert sorted({row["step"] for row in rows}) == list(steps)
    moved = {row["step"] for row in rows if row["grassmann_distance"] > 1e-3}
    assert moved == {step for step in steps if step > 1 and step % INTERVAL == 1}


def test_the_time_it_takes_is_not_the_steps(tmp_path, monkeypatch):
    clock, append = [0.0], JsonLines.append

    def slow_disk(self, *rows):
        clock[0] += 100
        append(self, *rows)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(JsonLines, "append", slow_disk)
    config, watch = configure(tmp_path), Stopwatch()
    write(config, states_of(config), watch=watch)
    assert (clock[0], watch.lap()) == (500, 0)


def test_off_it_neither_keeps_nor_writes_anything(tmp_path, monkeypatch):
    config = configure(tmp_path, diagnostics=False)
    monkeypatch.setattr(jax, "jit", None)
    with Diagnostics(config, 0, None) as diagnostics:
        diagnostics.before(1, None, 0)
        diagnostics.after(1, None, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    ['{"step": 1, "loss": 2.0}', '{"step": 1, "matrix": 3, "layer": 0}', '{"step": 1'],
)
def test_lines_of_something_else_are_moved(tmp_path, line):
    row = '{"step": 1, "matrix": "up", "layer": 0, "captured_energy": 0.5}'
    path = tmp_path / DIAGNOSTICS_FILE
    path.write_text(f"{line}\n{row}\n")
    with Diagnostics(configure(tmp_path), 5, mesh.make_mesh("fsdp=-1")):
        pass
    assert path.read_text() == row + "\n"
    assert (tmp_path / "diagnostics.dropped.jsonl").read_text() == line + "\n"
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_methods_that_recover_nothing(tmp_path):
    config = configure(tmp_path, "galore")
    rows = write(config, states_of(config))
    assert all("recovery_ratio" not in row for row in rows)
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


# --- Pictures -------------------------------------------------------------------


def test_a_picture_even_of_a_run_cut_short(tmp_path):
    config = configure(tmp_path)
    write(config, states_of(config), last=1)
    path = tmp_path / PLOT_FILE
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    (tmp_path / DIAGNOSTICS_FILE).unlink()
    write(config, states_of(config), last=0)
    assert not path.exists()


def test_a_disk_that_is_full_at_the_end_is_told_unless_there_is_worse(
    tmp_path, monkeypatch
):
    def full_disk(*args):
        raise OSError("No space left on device")

    config = configure(tmp_path)
    states = states_of(config)
    write(config, states, last=1)
    monkeypatch.setattr(subspace_plot, "plot", full_disk)
    devices = mesh.make_mesh("fsdp=1", jax.devices()[:1])
    with pytest.raises(OSError, match="No space left"), Diagnostics(config, 1, devices):
        pass
    with pytest.raises(ZeroDivisionError), Diagnostics(config, 1, devices):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("matrices", "labels"),
    [
        (["layers/attention/query/kernel", "layers/mlp/up/kernel"], ["query", "up"]),
        (["a/up/kernel", "b/down/up/kernel"], ["a", "down"]),
        (["up/a/in/kernel", "up/b/in/kernel", "a/kernel"], ["a/in", "b/in", "a"]),
        (["up/kernel"], ["up"]),
        (["kernel", "up/kernel"], ["kernel", "up/kernel"]),
    ],
)
def test_labels_are_short_and_tell_apart(matrices, labels):
    assert list(subspace_plot._labels(matrices).values()) == labels


# --- The program ----------------------------------------------------------------


def test_a_run_writes_and_draws(uninterrupted):
    """Rows after a kill, or from a later step on, are tested in test_resume."""
    directory = uninterrupted.directory
    rows = read_rows(directory / DIAGNOSTICS_FILE)
    assert len(rows) == 20 * 7 * 2
    assert {row["step"] for row in rows} == set(range(1, program.STEPS + 1, 5))
    for row in rows:
        assert 0 < row["captured_energy"] < 1
        assert row["recovery_ratio"] > 0
        assert row["step"] == 1 or 0 < row["grassmann_distance"] <= math.pi / 2
    assert (directory / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_an_optimizer_without_subspaces_is_refused(capsys):
    argv = [*program.FLAGS, "--optimizer", "adamw"]
    assert_pretrain_refuses(capsys, argv, "--optimizer adamw does not have")


@pytest.mark.parametrize("name", ["muon", "adafactor", "apollo", "apollo-mini"])
def test_every_optimizer_without_subspaces_is_refused(name):
    config = command_line.parse(
        PRESETS, "tiny", "", ["--diagnostics", "--optimizer", name]
    )
    with pytest.raises(ValueError, match=f"--optimizer {name} does not have"):
        check_has_subspaces(config)


def test_how_often_needs_to_look_at_all():
    with pytest.raises(ValueError, match="--diagnostics-every-steps 5 needs --diag"):
        ReportConfig(diagnostics_every_steps=5)
    with pytest.raises(ValueError, match="--diagnostics-every-steps must be at least"):
        ReportConfig(diagnostics=True, diagnostics_every_steps=0)
