"""Trial records: round trips, earlier versions, kinds of steps."""

import dataclasses
import json
import math

import pytest

from tests.train.comparison.test_comparison_report import record
from train.comparison import trial_records as records
from train.comparison.trial_records import Trial
from train.config.optimizer_config import OptimizerConfig


@pytest.mark.parametrize("growth_limit", [1.5, math.inf])
def test_a_record_comes_back_as_it_was(tmp_path, growth_limit):
    optimizer = OptimizerConfig(growth_limit=growth_limit, update_interval=3)
    written = dataclasses.replace(
        record(optimizer, 3, [9.5, None]),
        curve=[(1, {"loss": 9.75, "gradient_norm": None})],
    )
    records.save(written, tmp_path)
    records.save(written, tmp_path)
    assert records.load(tmp_path) == {written.trial: written}
    assert written.final_loss == math.inf
    assert len(list(tmp_path.iterdir())) == 1


def test_each_trial_has_a_file_of_its_own(tmp_path):
    optimizer = OptimizerConfig()
    for other in (optimizer, dataclasses.replace(optimizer, rank=3)):
        for seed in (0, 1):
            records.save(record(other, seed, [1.0]), tmp_path)
    assert len(records.load(tmp_path)) == len(list(tmp_path.iterdir())) == 4
    names = {path.name.rpartition("-")[0] for path in tmp_path.iterdir()}
    assert names == {"subtrack-0.001-seed0", "subtrack-0.001-seed1"}


def rewrite(directory, change):
    """Changes what the only record in a directory has about its optimizer."""
    (path,) = directory.glob("*.json")
    values = json.loads(path.read_text())
    change(values["trial"]["optimizer"])
    path.write_text(json.dumps(values))


def test_a_setting_that_is_new_takes_no_record_away(tmp_path):
    written = record(OptimizerConfig(rank=3), 0, [1.0])
    records.save(written, tmp_path)
    rewrite(tmp_path, lambda settings: settings.pop("angle"))
    assert records.load(tmp_path) == {written.trial: written}


def test_settings_that_change_nothing_do_not_make_another_trial(tmp_path):
    """Earlier versions wrote defaults, and settings of other methods."""
    written = record(OptimizerConfig(rank=3), 0, [1.0])
    records.save(written, tmp_path)
    rewrite(tmp_path, lambda settings: settings.update(b1=0.9, rho=0.5))
    assert records.load(tmp_path) == {written.trial: written}


def test_a_file_is_the_record_of_the_trial_in_it(tmp_path):
    written = record(OptimizerConfig(), 0, [1.0])
    records.save(written, tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "other.json")
    assert records.load(tmp_path) == {written.trial: written}


@pytest.mark.parametrize("text", ["[", "3", '{"trial": {"optimizer": 3}}'])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not the record of a trial: .*;"):
        records.load(tmp_path)


def test_steps_are_of_three_kinds():
    adamw, subtrack = (
        OptimizerConfig(name=name, update_interval=2) for name in ("adamw", "subtrack")
    )
    kinds = ["first", "steady", "moving", "steady", "moving"]
    assert records.step_kinds(subtrack, 5) == kinds
    assert records.step_kinds(adamw, 3) == ["first", "steady", "steady"]
    assert records.step_kinds(subtrack, 1) == ["first"]


def test_a_record_with_the_defaults_of_an_earlier_version_is_found(tmp_path):
    """Its name omitted other settings, and apollo's scale was a plain factor."""
    settings = {"name": "apollo-mini", "scale": 0.5, "b1": 0.9, "b2": 0.999}
    old = record(OptimizerConfig(**settings, eps=1e-6), 3, [9.5])
    values = json.loads(json.dumps(dataclasses.asdict(old)))
    for name in ("schedule", "warmup_steps", "decay_fraction"):
        del values["trial"]["optimizer"][name]
    path = tmp_path / "apollo-mini-0.001-seed3-0123456789ab.json"
    path.write_text(json.dumps(values))
    alpha = 128 * 0.5**2
    trial = Trial(OptimizerConfig(name="apollo-mini", scale=alpha, eps=1e-6), 3)
    assert records.load(tmp_path) == {trial: dataclasses.replace(old, trial=trial)}
