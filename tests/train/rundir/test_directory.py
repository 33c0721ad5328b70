"""Run directories: lock, identity of their files, checks on resume."""

import dataclasses
import datetime
import json
import shutil
import subprocess
import sys

import filelock
import pytest

from tests.train.tokenization.test_tokenizer import TEXT
from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.rundir import changes, identity
from train.rundir.directory import (
    CHECKPOINTS,
    LOCK_FILE,
    METRICS_FILE,
    OWN_FILES,
    keep_settings,
    note_checkpoint,
    open_directory,
)
from train.rundir.saved_config import (
    CONFIG_FILE,
    load_config,
    save_config,
)
from train.tokenization.tokenizer import Tokenizer

TINY = PRESETS["tiny"]


def changed(config=TINY, **values):
    """Replaces a field of a group: `changed(optimizer={"rank": 4})`."""
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **values)


def in_directory(path, **values):
    return changed(output_dir=path, **values)


def start_run(config, rows=1):
    """Creates the files of a run after some steps."""
    directory = config.output_dir
    with open_directory(config):
        save_config(config, directory / CONFIG_FILE)
        (directory / "tokenizer.json").write_text("{}")
        keep_settings(config, {}, 0)
        (directory / METRICS_FILE).write_text('{"step": 1}\n' * rows)
        (directory / CHECKPOINTS / "1").mkdir(parents=True)
        if not rows:
            (directory / CHECKPOINTS / "1").rmdir()


def test_a_directory_is_made_where_none_is(tmp_path):
    config = in_directory(tmp_path / "runs" / "mine")
    with open_directory(config) as found:
        assert not found
        assert config.output_dir.is_dir()


def test_other_files_do_not_make_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with open_directory(in_directory(tmp_path)) as found:
        assert not found
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_of_the_same_config_is_found(tmp_path, resume):
    config = in_directory(tmp_path)
    start_run(config)
    with open_directory(changed(config, start={"resume": resume})) as found:
        assert found


def test_a_run_that_died_before_its_first_step_is_no_loss(tmp_path):
    config = in_directory(tmp_path)
    start_run(config, rows=0)
    with open_directory(changed(config, seed=5)) as found:
        assert not found


def test_what_was_before_the_first_step_is_not_another_run_s(tmp_path):
    """The row and the checkpoint of step 0 belong to the config that made them."""
    config = in_directory(tmp_path)
    start_run(config, rows=0)
    (tmp_path / METRICS_FILE).write_text('{"step": 0, "eval_loss": 5.5}\n')
    (tmp_path / CHECKPOINTS / "0").mkdir(parents=True)
    with open_directory(changed(config, seed=5)) as found:
        assert not found
        assert list((tmp_path / CHECKPOINTS).iterdir()) == []


@pytest.mark.parametrize("later", ["metrics", "checkpoint"])
def test_steps_behind_step_0_make_a_run(tmp_path, later):
    config = in_directory(tmp_path)
    start_run(config, rows=0)
    rows = '{"step": 0, "eval_loss": 5.5}\n' + '{"step": 1}\n' * (later == "metrics")
    (tmp_path / METRICS_FILE).write_text(rows)
    for step in ("0", "1")[: 1 + (later == "checkpoint")]:
        (tmp_path / CHECKPOINTS / step).mkdir(parents=True)
    with open_directory(config) as found:
        assert found
    assert (tmp_path / METRICS_FILE).read_text() == rows
    assert (tmp_path / CHECKPOINTS / "0").exists()


def contents(directory):
    """All files in a directory except the lock."""
    paths = [path for path in directory.rglob("*") if path.name != LOCK_FILE]
    return {
        str(path.relative_to(directory)): path.is_file() and path.read_bytes()
        for path in paths
    }


def assert_refused(config, *messages):
    """Asserts that opening fails in one line and changes nothing."""
    before = contents(config.output_dir)
    with pytest.raises(ValueError) as raised:
        open_directory(config).__enter__()
    assert contents(config.output_dir) == before
    message = str(raised.value)
    assert "\n" not in message
    for each in messages:
        assert each in message


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("is_emptied", [False, True])
@pytest.mark.parametrize("has_rows", [False, True])
def test_checkpoints_that_are_gone_end_no_run(tmp_path, resume, is_emptied, has_rows):
    """With rows, or without them but with the saved state."""
    config = in_directory(tmp_path, start={"resume": resume})
    start_run(in_directory(tmp_path))
    assert note_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / CHECKPOINTS)
    if is_emptied:
        (tmp_path / CHECKPOINTS).mkdir()
        (tmp_path / CHECKPOINTS / "20.orbax-checkpoint-tmp-1").mkdir()
    if not has_rows:
        (tmp_path / METRICS_FILE).unlink()
    assert_refused(config, f"put {tmp_path / CHECKPOINTS} back", "another directory")


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path):
    start_run(in_directory(tmp_path))
    (tmp_path / CHECKPOINTS / "1").rmdir()
    assert not note_checkpoint(tmp_path)
    with open_directory(in_directory(tmp_path, start={"resume": True})) as found:
        assert found
    assert (tmp_path / METRICS_FILE).read_text() == '{"step": 1}\n'
    (tmp_path / CHECKPOINTS).rmdir()  # created before the first row
    assert_refused(in_directory(tmp_path), "are gone")


@pytest.mark.parametrize("name", OWN_FILES)
def test_files_of_somebody_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert_refused(
        in_directory(tmp_path), f"has no config.json of this program, but {name}"
    )


def test_a_lost_or_foreign_config_ends_no_run(tmp_path):
    config = in_directory(tmp_path)
    start_run(config)
    written = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).unlink()
    for start in ({}, {"resume": True}):
        lost = changed(config, start=start)
        assert_refused(lost, "no config.json of this", METRICS_FILE, CHECKPOINTS)
    (tmp_path / METRICS_FILE).unlink()
    shutil.rmtree(tmp_path / CHECKPOINTS)
    for content in (written[:99], '{"model_type": "llama", "hidden_size": 64}', ""):
        (tmp_path / CONFIG_FILE).write_text(content)
        assert_refused(config, "another config.json than a run writes", "another dir")


@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_lost_tokenizer_is_told(tmp_path, has_checksums):
    start_run(in_directory(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    if not has_checksums:
        (tmp_path / identity.IDENTITY_FILE).unlink()
    assert_refused(in_directory(tmp_path), "has lost its tokenizer.json", "put it back")


def test_another_tokenizer_in_its_place_is_told(tmp_path):
    start_run(in_directory(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert_refused(in_directory(tmp_path), "tokenizer.json is not the one that the run")


def test_damaged_checksums_are_told(tmp_path):
    start_run(in_directory(tmp_path))
    for content in ("", "{", "[]", '{"data.data_glob": [{"bytes": 3}]}'):
        (tmp_path / identity.IDENTITY_FILE).write_text(content)
        assert_refused(in_directory(tmp_path), "is damaged", "delete it to continue")
    (tmp_path / identity.IDENTITY_FILE).unlink()
    with open_directory(in_directory(tmp_path)) as found:
        assert found == ({}, False, False)


@pytest.fixture
def texts(tmp_path):
    """A directory with two texts."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for name in "ab":
        (directory / f"{name}.txt").write_text(name * 300_000)
    return directory


def on_texts(directory, texts, **values):
    glob = {"data_glob": str(texts / "*.txt")}
    return in_directory(directory / "run", data=glob, **values)


def test_texts_may_be_elsewhere(tmp_path, texts):
    start_run(on_texts(tmp_path, texts))
    texts.rename(tmp_path / "moved")
    assert_refused(on_texts(tmp_path, texts), "no file matches", "give its new place")
    (tmp_path / "moved" / "a.txt").rename(tmp_path / "moved" / "0.txt")
    moved = on_texts(tmp_path, tmp_path / "moved")
    with open_directory(moved) as found:
        names = {name: tuple(change) for name, change in found.changes.items()}
        assert names == {
            "data.data_glob": (str(texts / "*.txt"), str(tmp_path / "moved" / "*.txt"))
        }
        assert not found.has_other_rows


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_text("c" * 300_000), "b.txt has other content"),
        (lambda path: path.write_text("b" * 9), "b.txt has 9 bytes instead of 300,000"),
        (lambda path: path.unlink(), "1 files instead of 2: b.txt is gone"),
        (lambda path: path.with_name("c.txt").touch(), "instead of 2: c.txt is new"),
    ],
)
def test_other_texts_in_their_place_are_told(tmp_path, texts, change, told):
    start_run(on_texts(tmp_path, texts))
    change(texts / "b.txt")
    allow = "--allow-changes data.data_glob to continue"
    assert_refused(on_texts(tmp_path, texts), told, "Put them back", allow)
    shutil.copytree(texts, tmp_path / "elsewhere")
    elsewhere = on_texts(tmp_path, tmp_path / "elsewhere")
    assert_refused(elsewhere, "--data-glob", told, allow)
    for config in (on_texts(tmp_path, texts), elsewhere):
        config = changed(config, start={"allow_changes": "data_glob"})
        with open_directory(config) as found:
            assert told in found.changes["data.data_glob"][1]
            assert found.has_other_rows


def test_a_dataset_may_be_elsewhere_and_not_another(tmp_path):
    data = tmp_path / "data"
    for name in ("train/0.jsonl", "validation.jsonl", ".cache"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    start_run(in_directory(tmp_path / "run", data={"dataset": str(data)}))
    data.rename(tmp_path / "moved")
    (tmp_path / "moved" / ".cache").unlink()
    config = in_directory(tmp_path / "run", data={"dataset": str(tmp_path / "moved")})
    with open_directory(config) as found:
        assert set(found.changes) == {"data.dataset"} and not found.has_other_rows
    (tmp_path / "moved" / "validation.jsonl").write_text("other")
    assert_refused(config, "validation.jsonl has 5 bytes instead of 16")


def test_a_tokenizer_may_be_elsewhere_and_not_another(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    own, other = (Tokenizer.train([TEXT], size) for size in (280, 290))
    start_run(in_directory(run))
    own.save(run)
    keep_settings(in_directory(run), {}, 1)
    elsewhere.mkdir()
    own.save(elsewhere)
    config = in_directory(run, data={"tokenizer": str(elsewhere)})
    with open_directory(config) as found:
        assert set(found.changes) == {"data.tokenizer"}
    other.save(elsewhere)
    assert_refused(config, f"--tokenizer {elsewhere} here, None there, which cannot")


def test_steps_grow_but_not_below_a_checkpoint(tmp_path):
    start_run(in_directory(tmp_path, steps=30))
    (tmp_path / CHECKPOINTS / "20").mkdir()
    with open_directory(in_directory(tmp_path, steps=31)) as found:
        assert found.changes == {"steps": (30, 31)}
    allow = {"allow_changes": "steps"}
    assert_refused(
        in_directory(tmp_path, steps=20), "--allow-changes steps to continue"
    )
    with open_directory(in_directory(tmp_path, steps=20, start=allow)) as found:
        assert found.changes == {"steps": (30, 20)}
    for start in ({}, allow):
        assert_refused(
            in_directory(tmp_path, steps=19, start=start),
            "--steps 19: the run in",
            "has a checkpoint of step 20 already",
        )


def test_changes_of_the_optimizer_s_state_are_refused_whatever_is_allowed(tmp_path):
    start_run(in_directory(tmp_path))
    config = in_directory(
        tmp_path,
        optimizer={"rank": 32, "learning_rate": 1.0},
        start={"allow_changes": "rank,learning_rate"},
    )
    assert_refused(
        config, "--rank 32 here, 64 there, which cannot change: the optimizer's state"
    )
    with open_directory(changed(config, optimizer={"rank": 64})) as found:
        assert found == ({"optimizer.learning_rate": (3e-3, 1.0)}, False, False)


def test_what_a_run_is_from_a_step_on_is_written_down(tmp_path):
    config = in_directory(tmp_path)
    start_run(config)
    for step in (20, 30):
        config = changed(config, seed=step)
        keep_settings(config, {"seed": (config.seed - 10, step)}, step)
        keep_settings(config, {}, step)
    assert load_config(PretrainConfig, tmp_path / CONFIG_FILE) == config
    assert changes.evaluation_start(tmp_path) == -1
    keep_settings(config, {}, 25, evaluates_other_text=True)
    assert changes.evaluation_start(tmp_path) == -1
    lines = (tmp_path / changes.HISTORY_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [20, 30]
    assert rows[1]["changes"] == {"seed": {"from": 20, "to": 30}}
    now = datetime.datetime.now(datetime.UTC)
    for row in rows:
        age = now - datetime.datetime.fromisoformat(row["time"])
        assert -1 < age.total_seconds() < 100
    tokens = {"data.eval_tokens": (1, 2)}
    keep_settings(config, tokens, 40, evaluates_other_text=True)
    keep_settings(config, {"seed": (30, 31)}, 50)
    assert changes.evaluation_start(tmp_path) == 40
    with (tmp_path / changes.HISTORY_FILE).open("ab") as file:
        file.write(b"\xff\nnull\n" + b"[" * 100_000)
    assert changes.evaluation_start(tmp_path) == 40


def test_a_run_of_another_config_is_told_apart(tmp_path):
    config = in_directory(tmp_path)
    start_run(config)
    other = changed(config, seed=5, optimizer={"name": "galore", "rank": 4})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds another run") as raised:
        open_directory(other).__enter__()
    message = str(raised.value)
    assert str(tmp_path) in message
    assert "--seed 5 here, 0 there" in message
    assert "--optimizer galore here, subtrack there" in message
    assert "--rank 4 here, 64 there" in message
    assert "--steps" not in message
    assert sorted(tmp_path.iterdir()) == before
    with open_directory(config) as found:  # the lock is free again
        assert found


def test_nothing_to_resume(tmp_path):
    config = in_directory(tmp_path / "typo", start={"resume": True})
    with pytest.raises(ValueError, match="--resume: there is no run in --output-dir"):
        open_directory(config).__enter__()
    assert not config.output_dir.exists()


def test_a_directory_in_use_is_not_shared(tmp_path):
    config = in_directory(tmp_path)
    start_run(config)
    script = (
        "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / LOCK_FILE)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=r"a run in --output-dir .* is going on"):
            open_directory(config).__enter__()
        process.kill()
    with open_directory(config) as found:  # the lock of a killed process is released
        assert found
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / LOCK_FILE, blocking=False).acquire()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="cannot write to --output-dir") as raised:
            open_directory(in_directory(directory)).__enter__()
        assert str(directory) in str(raised.value)


def test_a_run_whose_metrics_are_gone_is_known_by_its_checkpoints(tmp_path):
    start_run(in_directory(tmp_path), rows=0)
    (tmp_path / CHECKPOINTS / "20").mkdir(parents=True)
    with open_directory(in_directory(tmp_path)) as found:
        assert found
    with (
        pytest.raises(ValueError, match="--seed 1 here, 0 there"),
        open_directory(in_directory(tmp_path, seed=1)),
    ):
        pass
