"""Saved configs: round trips, earlier versions, damage."""

import json
import pathlib

import pytest

from tests.train.rundir.test_directory import TINY, changed
from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.rundir import changes
from train.rundir.saved_config import (
    ALWAYS_SAVED,
    CONFIG_FILE,
    load_config,
    save_config,
)


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
    """Settings of earlier versions: all saved, and apollo's scale is a plain factor."""
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
    assert changes.find(loaded, changed(optimizer={"name": name})) == {}
    other = changed(optimizer={"name": name, "b2": 0.5})
    before = 0.99 if name == "ldadam" else 0.999
    assert changes.find(other, loaded) == {"optimizer.b2": (before, 0.5)}


def test_a_config_of_an_earlier_version_has_the_defaults_of_what_is_new(tmp_path):
    path = tmp_path / CONFIG_FILE
    save_config(TINY, path)
    values = json.loads(path.read_text())

    def keep_oldest(values, prefix=""):
        for name, value in list(values.items()):
            if isinstance(value, dict) and name != "model":
                keep_oldest(value, f"{name}.")
            elif prefix + name not in {*ALWAYS_SAVED, "model", "output_dir"}:
                del values[name]

    keep_oldest(values)
    assert "z_loss_weight" not in values and not values["sample"]
    path.write_text(json.dumps(values))
    assert changes.find(load_config(PretrainConfig, path), TINY) == {}


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
        (lambda v: v["optimizer"].pop("rank"), "damaged: it has no optimizer.rank;"),
        (
            lambda v: v.pop("data"),
            "it has no data.batch_size_sequences, data.data_glob",
        ),
        (
            lambda v: put(v, "optimizer", "beta", 1),
            "a newer version .* optimizer.beta ",
        ),
        (
            lambda v: put(v, "colour", {"hue": 1}),
            "a newer version .*: colour.hue means",
        ),
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
