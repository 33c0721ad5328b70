"""Checkpoints are restored bit for bit, or reported as damaged."""

import errno
import gc
import json
import pathlib
import shutil
import sys
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config.run_config import CheckpointChoice, CheckpointConfig
from train.rundir import checkpoint_reading, checksums, damage
from train.rundir import checkpoints as checkpoint
from train.rundir.checkpoint_reading import restore_params
from train.rundir.checkpoints import (
    CHECKPOINTS,
    DAMAGED_DIRECTORY,
    CheckpointError,
    Checkpoints,
)
from train.step.train_state import TrainState
from train.system import processes

# Coroutines that Orbax drops when a file is damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def make_state(step=0):
    """Leaves of every kind, with incompressible content."""
    keys = jax.random.split(jax.random.key(step), 4)
    return TrainState(
        step=jnp.int32(step),
        skipped_steps=jnp.int32(step // 2),
        params={
            "embedding": {"embedding": jax.random.normal(keys[0], (30, 16))},
            "head": {"kernel": jax.random.normal(keys[1], (16, 30), jnp.bfloat16)},
        },
        opt_state=(
            {"count": jnp.int32(step), "mu": jax.random.normal(keys[2], (30, 16))},
            {"key": jax.random.key_data(keys[3]), "empty": ()},
        ),
    )


def make_batches():
    dataset = grain.MapDataset.range(1000).shuffle(seed=3).repeat()
    return iter(dataset.to_iter_dataset())


def advance(batches, count):
    return [int(next(batches)) for _ in range(count)]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_equal(tree, other):
    """Asserts equal bits, structure and dtypes."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, leaf_ in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        assert leaf.dtype == leaf_.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(leaf_).tobytes()


def save_steps(directory, steps, config=None):
    with Checkpoints(directory, config or CheckpointConfig()) as checkpoints:
        batches, position = make_batches(), 0
        for step in steps:
            advance(batches, step - position)
            position = step
            checkpoints.save(step, make_state(step), batches)


def restore(directory):
    """Returns the restored state, the iterator and the reports."""
    reports = []
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        batches = make_batches()
        state = checkpoints.restore(abstract(make_state()), batches, reports.append)
    return state, batches, reports


def steps_in(directory):
    return sorted(int(path.name) for path in (directory / CHECKPOINTS).iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    save_steps(directory, [7, 12])
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """Checkpoints of steps 7 and 12, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_all_comes_back_to_the_last_bit(saved):
    state, batches, reports = restore(saved)
    assert_equal(state, make_state(12))
    expected = make_batches()
    advance(expected, 12)
    assert advance(batches, 20) == advance(expected, 20)
    assert reports == []


def test_nothing_is_restored_where_nothing_is(tmp_path):
    assert restore(tmp_path)[0] is None


def test_a_state_that_is_given_away_at_once_is_written_as_it_was(tmp_path):
    """The next step reuses the memory while the checkpoint is still being written."""

    @jax.jit
    def create():
        return {"w": jnp.ones((1000, 500)), "b": jnp.ones(3000, jnp.bfloat16)}

    grow = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = create()
    rest = TrainState(jnp.int32(0), jnp.int32(0), None, ())
    config = CheckpointConfig(keep_last_checkpoints=30)
    batches = make_batches()
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, rest._replace(params=params), batches)
            next(batches)
            for _ in range(3):
                before, params = params, grow(params)
            assert before["w"].is_deleted()
    target = abstract(rest._replace(params=params))
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps == list(range(1, 9))
        for step in reversed(checkpoints.steps):
            batches = make_batches()
            state = checkpoints.restore(target, batches, pytest.fail)
            for leaf in jax.tree.leaves(state.params):
                np.testing.assert_array_equal(leaf, np.full_like(leaf, 3 * step - 2))
            expected = make_batches()
            advance(expected, step - 1)
            assert advance(batches, 3) == advance(expected, 3)
            shutil.rmtree(tmp_path / CHECKPOINTS / str(step))
            checkpoints._manager.reload()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [50, 60]),
        ({"keep_last_checkpoints": 3}, [40, 50, 60]),
        ({"keep_last_checkpoints": 1, "keep_checkpoint_every_steps": 20}, [20, 40, 60]),
        ({"keep_checkpoint_every_steps": 30}, [30, 50, 60]),
    ],
)
def test_the_last_are_kept_and_some_for_good(tmp_path, settings, kept):
    config = CheckpointConfig(**settings)
    save_steps(tmp_path, range(10, 41, 10), config)
    # A resumed run keeps the checkpoints of the first one.
    save_steps(tmp_path, [50, 60], config)
    assert steps_in(tmp_path) == kept


def test_a_step_that_has_a_checkpoint_is_not_written_again(copy):
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        checkpoints.save(12, make_state(99), make_batches())
    assert_equal(restore(copy)[0], make_state(12))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, part=0.5):
    content = bytearray(path.read_bytes())
    content[int(part * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def flip_at_the_end(path):
    flip(path, part=0.98)


def assert_harmless_or_reported(directory):
    """Returns whether the damage was reported."""
    state, batches, reports = restore(directory)
    step = 7 if reports else 12
    assert_equal(state, make_state(step))
    expected = make_batches()
    advance(expected, step)
    assert advance(batches, 3) == advance(expected, 3)
    if reports:
        (report,) = reports
        aside = directory / DAMAGED_DIRECTORY / "12"
        assert "the checkpoint of step 12 is damaged (" in report
        assert f"now in {aside}, and the one of step 7 is used" in report
        assert "\n" not in report
        assert aside.is_dir()
        assert steps_in(directory) == [7]
    else:
        assert steps_in(directory) == [7, 12]
    return bool(reports)


@pytest.mark.parametrize(
    ("item", "damage"),
    [
        ("params", truncate),
        ("params", flip),
        ("params", pathlib.Path.unlink),
        ("rest", flip_at_the_end),
        ("data", truncate),
        ("data", pathlib.Path.unlink),
        ("check", truncate),
        ("check", flip),
    ],
)
def test_a_damaged_file_is_harmless_or_reported(copy, tmp_path, item, damage):
    files = [
        path.relative_to(copy)
        for path in (copy / CHECKPOINTS / "12" / item).rglob("*")
        if path.is_file() and (path.stat().st_size > 50 or item == "data")
    ]
    reported = 0
    for number, file in enumerate(files):
        broken = shutil.copytree(copy, tmp_path / str(number))
        damage(broken / file)
        reported += assert_harmless_or_reported(broken)
    assert reported > 0


def test_another_position_in_the_data_is_reported(copy, tmp_path):
    """A digit changed into another."""
    file = copy / CHECKPOINTS / "12" / "data" / "metadata"
    content = file.read_bytes()
    positions = [i for i in range(len(content)) if content[i : i + 1].isdigit()]
    assert positions
    for position in positions:
        broken = shutil.copytree(copy, tmp_path / str(position))
        digit = b"%d" % ((int(content[position : position + 1]) + 1) % 10)
        changed = content[:position] + digit + content[position + 1 :]
        (broken / file.relative_to(copy)).write_bytes(changed)
        assert assert_harmless_or_reported(broken)


@pytest.mark.parametrize("item", ["params", "rest", "data", "check"])
def test_a_part_that_is_gone_is_reported(copy, item):
    shutil.rmtree(copy / CHECKPOINTS / "12" / item)
    assert assert_harmless_or_reported(copy)


def spoil_checksum(directory, item):
    """Flipped bits that no file's own checksum covers."""
    path = directory / CHECKPOINTS / "12" / "check" / "metadata"
    check = json.loads(path.read_text())
    check[item][min(check[item])] ^= 1
    del check["check"]
    check["check"] = checksums.digest(check)
    path.write_text(json.dumps(check))
    damage.list_files(path.parents[1])


@pytest.mark.parametrize("item", ["params", "rest"])
def test_another_state_than_was_saved_is_reported(copy, item):
    spoil_checksum(copy, item)
    assert assert_harmless_or_reported(copy)
    *_, reports = restore(copy)
    assert reports == []


def test_a_step_put_aside_is_saved_anew(copy):
    truncate(copy / CHECKPOINTS / "12" / "check" / "metadata")
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        batches = make_batches()
        checkpoints.restore(abstract(make_state()), batches, lambda report: None)
        advance(batches, 5)
        checkpoints.save(12, make_state(12), batches)
    assert steps_in(copy) == [7, 12]
    assert not assert_harmless_or_reported(copy)


def test_without_a_sound_checkpoint_nothing_is_moved(copy):
    for step in (7, 12):
        truncate(copy / CHECKPOINTS / str(step) / "check" / "metadata")
    with pytest.raises(CheckpointError, match="To start over") as raised:
        restore(copy)
    message = str(raised.value)
    assert f"no checkpoint in {copy / CHECKPOINTS} can be read; of step 12:" in message
    assert "\n" not in message
    assert steps_in(copy) == [7, 12]
    assert not (copy / DAMAGED_DIRECTORY).exists()


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_state_of_other_shapes_is_not_restored(copy, is_listed):
    if not is_listed:
        (copy / CHECKPOINTS / "12" / damage.FILES).unlink()
    other = make_state()._replace(params={"head": {"kernel": jnp.zeros((3, 3))}})
    with (
        Checkpoints(copy, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match="it is of another version") as raised,
    ):
        checkpoints.restore(abstract(other), make_batches())
    shape = "['embedding']['embedding'] is float32[30, 16] in it, and absent in this"
    assert shape in str(raised.value)
    assert "the checkpoint of step 12 in" in str(raised.value)
    assert steps_in(copy) == [7, 12]


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize(
    ("file", "spoil", "listed", "unlisted"),
    [
        ("params/manifest.ocdbt", truncate, "has 57 of 114 bytes", "Length in header"),
        ("params/manifest.ocdbt", flip, "has changed since", "CRC-32C checksum"),
        ("params/d/*", pathlib.Path.unlink, "is missing", "is missing or incomplete"),
        ("rest/_METADATA", truncate, "has 704 of 1,408 bytes", "Unterminated string"),
        ("check/metadata", flip, "has changed since", "is not what was saved"),
        ("data/metadata", pathlib.Path.unlink, "is missing", "not found"),
    ],
)
def test_damage_is_told_in_one_line_that_names_the_file(
    copy, file, spoil, listed, unlisted, is_listed
):
    (path,) = (copy / CHECKPOINTS / "12").glob(file)
    spoil(path)
    if not is_listed:  # saved by an earlier version
        (copy / CHECKPOINTS / "12" / damage.FILES).unlink()
    *_, (report,) = restore(copy)
    name = str(path.relative_to(copy / CHECKPOINTS / "12"))
    if is_listed:
        assert f"the checkpoint of step 12 is damaged ({name} {listed}" in report
    else:
        assert unlisted in report
        assert name in report or "/_METADATA" in name
    assert len(report) < 500


OWN_TROUBLE = {
    "memory": MemoryError("cannot allocate"),
    "device memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    "files": OSError(errno.EMFILE, "Too many open files"),
    "permission": PermissionError(errno.EACCES, "Permission denied", "params"),
    "in words": ValueError("INTERNAL: Failed [os_error_code='23' source locations=1]"),
    "of the program": TypeError("unexpected keyword"),
}


@pytest.mark.parametrize("error", OWN_TROUBLE.values(), ids=OWN_TROUBLE)
@pytest.mark.parametrize("is_wrapped", [True, False])
@pytest.mark.parametrize("is_listed", [True, False])
def test_trouble_of_the_process_is_no_damage(
    copy, monkeypatch, error, is_wrapped, is_listed
):
    if not is_listed:  # an earlier version, whose files have no checksums
        (copy / CHECKPOINTS / "12" / damage.FILES).unlink()
        if isinstance(error, TypeError):
            pytest.skip("as errors are where metadata is damaged")

    def fail(reader, step, items):
        if step == 12:
            if is_wrapped:
                raise Exception("Encountered error while reading") from error
            raise error
        return read(reader, step, items)

    read = checkpoint_reading.read_arrays
    monkeypatch.setattr(checkpoint_reading, "read_arrays", fail)
    match = "the checkpoint of step 12 in .* cannot be read: "
    with pytest.raises(CheckpointError, match=match) as raised:
        restore(copy)
    words = (
        "cannot allocate",
        "of memory",
        "open files",
        "denied",
        "Failed",
        "keyword",
    )
    message = str(raised.value).removesuffix(
        ". It is not known to be damaged, and stays as it is"
    )
    assert message.endswith(words)
    assert steps_in(copy) == [7, 12]
    with pytest.raises(CheckpointError, match=match):
        restore_params(copy, abstract(make_state().params), report=pytest.fail)


def test_ctrl_c_is_no_damage(copy, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_reading, "read_arrays", interrupt)
    with pytest.raises(KeyboardInterrupt):
        restore(copy)
    assert steps_in(copy) == [7, 12]


@pytest.fixture
def other_process(monkeypatch):
    """A second process; each test sets its answers about step 12."""
    told = []

    def gather(value):
        # It behaves like this process, except for the answers set.
        is_found = told and (value is None or isinstance(value, damage.Diagnosis))
        return [value, told.pop(0) if is_found else value]

    monkeypatch.setattr(processes, "gather", gather)
    return told


def test_processes_agree_on_what_all_can_read(copy, other_process):
    other_process.append(["params/manifest.ocdbt is missing", True])
    state, batches, (report,) = restore(copy)
    assert_equal(state, make_state(7))
    expected = make_batches()
    advance(expected, 7)
    assert advance(batches, 3) == advance(expected, 3)
    assert (
        "the checkpoint of step 12 is damaged (process 1: params/manifest.ocdbt is "
        "missing)" in report
    )
    assert steps_in(copy) == [7]


@pytest.mark.parametrize("is_damaged", [True, False])
def test_trouble_of_one_process_stops_all(copy, other_process, is_damaged):
    other_process.append(["out of memory", False])
    if is_damaged:  # in this process only
        truncate(copy / CHECKPOINTS / "12" / "check" / "metadata")
    with pytest.raises(CheckpointError, match="read: process 1: out of memory"):
        restore(copy)
    assert steps_in(copy) == [7, 12]


def test_what_was_put_aside_before_is_kept(copy):
    first = copy / DAMAGED_DIRECTORY / "12"
    first.mkdir(parents=True)
    truncate(copy / CHECKPOINTS / "12" / "check" / "metadata")
    *_, (report,) = restore(copy)
    assert f"now in {first}-2, and" in report
    assert list(first.iterdir()) == []


def test_what_a_killed_process_left_is_cleared(copy):
    newest = copy / CHECKPOINTS / "12"
    unfinished = copy / CHECKPOINTS / "15.orbax-checkpoint-tmp"
    shutil.copytree(newest, unfinished)
    (unfinished / "params").rename(unfinished / "params.orbax-checkpoint-tmp")
    assert_equal(restore(copy)[0], make_state(12))
    assert steps_in(copy) == [7, 12]


def full_disk(*args, **options):
    raise OSError("No space left on device\n\nDetails.")


@pytest.mark.parametrize("part", ["save", "wait_until_finished"])
def test_a_write_that_fails_is_told_with_what_there_is(copy, monkeypatch, part):
    with Checkpoints(copy, CheckpointConfig()) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, part, full_disk)
            with pytest.raises(CheckpointError) as raised:
                checkpoints.save(13, make_state(13), make_batches())
                checkpoints.wait()
        assert str(raised.value) == (
            f"could not write a checkpoint to {copy / CHECKPOINTS}: No space left on "
            "device. The last good checkpoint: step 12"
        )


def test_a_failed_write_does_not_hide_what_went_wrong_first(copy, monkeypatch):
    checkpoints = Checkpoints(copy, CheckpointConfig())
    monkeypatch.setattr(checkpoints, "wait", lambda: checkpoints._guard(full_disk))
    with pytest.raises(ZeroDivisionError), checkpoints:
        raise ZeroDivisionError
    with pytest.raises(CheckpointError, match="No space"), checkpoints:
        pass


def test_parameters_come_back_alone(saved):
    state = make_state(12)
    restored = restore_params(saved, abstract(state.params))
    assert restored.step == 12
    assert_equal(restored.params, state.params)


def test_parameters_that_are_damaged_or_not_there_are_an_error(copy, tmp_path):
    target = abstract(make_state().params)
    for directory in (tmp_path / "none", tmp_path / "empty"):
        if directory.name == "empty":
            (directory / CHECKPOINTS).mkdir(parents=True)
        with pytest.raises(CheckpointError, match="no checkpoints in "):
            restore_params(directory, target)
    for step in ("7", "12"):
        truncate(copy / CHECKPOINTS / step / "params" / "manifest.ocdbt")
    with pytest.raises(
        CheckpointError, match=r"step 12 in .* cannot be read"
    ) as raised:
        restore_params(copy, target)
    assert "\n" not in str(raised.value)
    assert steps_in(copy) == [7, 12]


def test_other_parameters_than_were_saved_are_reported(copy):
    spoil_checksum(copy, "params")
    reports = []
    target = abstract(make_state().params)
    assert restore_params(copy, target, report=reports.append).step == 7
    (report,) = reports
    assert report.endswith("is not what was saved; the one of step 7 is used")
    with pytest.raises(CheckpointError, match="is not what was saved"):
        restore_params(copy, target, CheckpointChoice(step=12))


@pytest.fixture
def quieted(monkeypatch):
    """Orbax silenced for one test; collects the remaining output."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    checkpoint.quiet_orbax()
    return shown


def test_only_what_orbax_leaves_behind_is_kept_quiet(quieted):
    for message in ("Event loop is closed", "something is wrong"):
        error = RuntimeError(message)
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, object=None))
    assert [str(report.exc_value) for report in quieted] == ["something is wrong"]


@pytest.mark.parametrize("item", ["params", "rest"])
def test_a_damaged_checkpoint_is_not_also_told_by_orbax(copy, item, quieted, capfd):
    for path in (copy / CHECKPOINTS / "12" / item).rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert assert_harmless_or_reported(copy)
    gc.collect()
    assert quieted == []
    assert capfd.readouterr().err == ""
