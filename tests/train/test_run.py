"""A directory is taken by one run at a time, and says what it was told."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import filelock
import pytest

from train.config import PretrainConfig
from train.presets import PRESETS
from train.run import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOCK_FILE,
    METRICS_FILE,
    differences,
    load_config,
    open_directory,
    save_config,
)

TINY = PRESETS["tiny"]


def changed(config=TINY, **values):
    """`changed(optimizer={"rank": 4})` changes a field of a group."""
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **values)


def in_directory(path, **values):
    return changed(output_dir=path, **values)


def start_run(config, rows=1):
    """Leaves what a run leaves after so many steps."""
    with open_directory(config):
        save_config(config, config.output_dir / CONFIG_FILE)
        (config.output_dir / METRICS_FILE).write_text('{"step": 1}\n' * rows)


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
        assert not (tmp_path / METRICS_FILE).exists()
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
    with open_directory(config) as found:  # a killed process holds nothing
        assert found
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / LOCK_FILE, blocking=False).acquire()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="cannot write to --output-dir") as raised:
            open_directory(in_directory(directory)).__enter__()
        assert str(directory) in str(raised.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back(tmp_path, name):
    save_config(PRESETS[name], tmp_path / CONFIG_FILE)
    assert load_config(PretrainConfig, tmp_path / CONFIG_FILE) == PRESETS[name]


def test_changed_values_come_back_with_their_types(tmp_path):
    config = changed(
        output_dir=pathlib.Path("an/other ∘ place"),
        steps=7,
        z_loss_weight=1e-4,
        model={"tie_embeddings": True, "num_key_value_heads": 2, "dtype": "bfloat16"},
        data={"data_glob": "ä/*.txt", "packing": "padded", "eval_tokens": 10**12},
        optimizer={"learning_rate": 1 / 3, "step_size": 1e-30, "name": "grass-walk"},
        checkpoint={"keep_checkpoint_every_steps": 1000},
        report={"tensorboard": True, "peak_teraflops": 989.5},
        sample={"sample_prompt": '"Ahab"\n\t'},
    )
    save_config(config, tmp_path / CONFIG_FILE)
    loaded = load_config(PretrainConfig, tmp_path / CONFIG_FILE)
    assert loaded == config
    assert isinstance(loaded.output_dir, pathlib.Path)


@pytest.mark.parametrize("name", ["subtrack", "apollo", "ldadam"])
def test_a_run_saved_before_there_were_schedules_goes_on(tmp_path, name):
    """Its settings were all written out, and apollo's scale was a plain factor."""
    own = {"ldadam": {"b1": 0.908, "b2": 0.99, "scale": 1.0}, "apollo": {"scale": 1.0}}
    values = {"scale": 0.25, "b1": 0.9, "b2": 0.999, "damping": 1.0, "angle": 0.1}
    values |= {"warmup_fraction": 0.1, "rho": 0.908, "projection_learning_rate": 0.005}
    values |= {"growth_limit": 1.01, "name": name} | own.get(name, {})
    save_config(changed(optimizer=values), tmp_path / CONFIG_FILE)
    saved = json.loads((tmp_path / CONFIG_FILE).read_text())
    for field in ("schedule", "warmup_steps", "decay_fraction"):
        del saved["optimizer"][field]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(saved))
    loaded = load_config(PretrainConfig, tmp_path / CONFIG_FILE)
    assert differences(loaded, changed(optimizer={"name": name})) == []
    other = changed(optimizer={"name": name, "b2": 0.5})
    before = 0.99 if name == "ldadam" else 0.999
    assert differences(other, loaded) == [f"--b2 0.5 here, {before} there"]


def test_how_a_process_began_is_not_saved(tmp_path):
    start = {"resume": True, "config": pathlib.Path("other.json")}
    save_config(changed(start=start), tmp_path / CONFIG_FILE)
    assert load_config(PretrainConfig, tmp_path / CONFIG_FILE) == TINY


def put(values, *path_and_value):
    *path, name, value = path_and_value
    for key in path:
        values = values[key]
    values[name] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("model"), "model: Field required"),
        (lambda v: v["model"].pop("num_layers"), "model.num_layers"),
        (lambda v: v["optimizer"].pop("rank"), "another version .* optimizer.rank"),
        (lambda v: v.pop("sample"), "sample.sample_prompt"),
        (lambda v: put(v, "optimizer", "momentum", 1), "differs in optimizer.momentum"),
        (lambda v: put(v, "colour", {"hue": 1}), "differs in colour.hue"),
        (lambda v: put(v, "steps", "many"), "steps: Input should be a valid integer"),
        (lambda v: put(v, "steps", 1.5), "steps: Input should be a valid integer"),
        (lambda v: put(v, "steps", 0), "--steps must be at least 1, got 0"),
        (
            lambda v: put(v, "optimizer", "learning_rate", None),
            "optimizer.learning_rate: Input should",
        ),
        (lambda v: put(v, "optimizer", "name", "sgd"), "optimizer.name: Input should"),
        (lambda v: put(v, "model", 3), "model: Input should"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(tmp_path, change, message):
    path = tmp_path / CONFIG_FILE
    save_config(TINY, path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as raised:
        load_config(PretrainConfig, path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b"7"])
def test_what_is_no_config_is_one_clear_error(tmp_path, content):
    path = tmp_path / CONFIG_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as raised:
        load_config(PretrainConfig, path)
    assert "\n" not in str(raised.value)
    assert ": :" not in str(raised.value)


def test_only_what_changes_the_numbers_makes_a_difference():
    other = changed(
        output_dir=pathlib.Path("elsewhere"),
        max_skipped_steps_in_a_row=99,
        checkpoint={"checkpoint_every_steps": 7, "keep_last_checkpoints": 9},
        report={"tensorboard": True, "wandb_project": "x", "peak_teraflops": 1.0},
        sample={"sample_prompt": "Call me", "sample_length_tokens": 3},
        start={"resume": True, "config": pathlib.Path("x.json")},
    )
    assert differences(TINY, other) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 3}, "--seed 3 here, 0 there"),
        ({"steps": 301}, "--steps 301 here, 300 there"),
        ({"data": {"packing": "padded"}}, "--packing padded here, packed there"),
        ({"model": {"num_layers": 5}}, "--num-layers 5 here, 4 there"),
        ({"optimizer": {"b2": 0.5}}, "--b2 0.5 here, 0.999 there"),
        ({"data": {"tokenizer": "t.json"}}, "--tokenizer t.json here, None there"),
    ],
)
def test_what_changes_the_numbers_is_told(change, told):
    assert differences(changed(**change), TINY) == [told]


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
