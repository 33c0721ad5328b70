"""Trial records: round trips and derived numbers."""

import dataclasses
import json
import math

import pytest

from tests.train.comparison.test_comparison_report import record
from train.comparison import trial_records as records
from train.comparison.variants import Trial
from train.config.optimizer_config import OptimizerConfig


@pytest.mark.parametrize("growth_limit", [1.01, math.inf])
def test_a_record_comes_back_as_it_was(tmp_path, growth_limit):
    optimizer = OptimizerConfig(growth_limit=growth_limit, step_size=0.5)
    written = dataclasses.replace(
        record(optimizer, 3, [9.5, None]),
        curve=[(1, {"loss": 9.75, "gradient_norm": None})],
    )
    records.save(written, tmp_path)
    assert records.load(written.trial, tmp_path) == written
    assert written.final_loss == math.inf
    assert len(list(tmp_path.iterdir())) == 1


def test_each_trial_has_a_file_of_its_own(tmp_path):
    optimizer = OptimizerConfig()
    others = [
        Trial(optimizer, 0),
        Trial(optimizer, 1),
        Trial(dataclasses.replace(optimizer, rank=3), 0),
    ]
    assert len({records.path_of(trial, tmp_path) for trial in others}) == 3
    records.save(record(optimizer, 0, [1.0]), tmp_path)
    assert [records.load(trial, tmp_path) is None for trial in others] == [
        False,
        True,
        True,
    ]


def test_a_setting_that_is_new_takes_no_record_away(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Later(OptimizerConfig):
        new: float = 1.0

    trial, later = Trial(OptimizerConfig(rank=3), 0), Trial(Later(rank=3), 0)
    assert records.path_of(trial, tmp_path) == records.path_of(later, tmp_path)
    changed = Trial(Later(rank=3, new=2.0), 0)
    assert records.path_of(changed, tmp_path) != records.path_of(later, tmp_path)
    written = record(trial.optimizer, 0, [1.0])
    records.save(written, tmp_path)
    path = records.path_of(written.trial, tmp_path)
    stored = json.loads(path.read_text())
    del stored["trial"]["optimizer"]["angle"]  # as in earlier versions
    path.write_text(json.dumps(stored))
    assert records.load(written.trial, tmp_path) == written


def test_the_record_of_another_trial_is_refused(tmp_path):
    written = record(OptimizerConfig(), 0, [1.0])
    records.save(written, tmp_path)
    other = dataclasses.replace(written.trial, seed=1)
    records.path_of(written.trial, tmp_path).rename(records.path_of(other, tmp_path))
    with pytest.raises(ValueError, match="is the record of another trial: delete it"):
        records.load(other, tmp_path)


def test_seconds_are_medians_of_each_kind_of_step():
    adamw, subtrack = (
        OptimizerConfig(name=name, update_interval=2) for name in ("adamw", "subtrack")
    )
    seconds = [9.0, 1.0, 3.0, 1.0, 5.0, 100.0, 4.0]
    kinds = records.by_kind(seconds, subtrack)
    assert kinds == {"first": 9.0, "moving": 4.0, "steady": 1.0}
    assert records.elapsed_seconds(subtrack, kinds, 4) == 9 + 1 + 4 + 1
    assert records.by_kind(seconds, adamw) == {"first": 9.0, "steady": 3.5}


def test_curves_are_thinned_by_averaging():
    counts = {"skipped_steps": 0.0, "count": 8.0}
    rows = [{"loss": float(k)} | counts for k in range(1000)]
    curve = records.thinned(rows, 1000)
    assert len(curve) == 200
    assert curve[0] == (5, {"loss": 2.0})
    assert curve[-1] == (1000, {"loss": 997.0})
    rows[3]["loss"] = math.nan
    assert records.thinned(rows[:7], 1000) == [
        (5, {"loss": None}),
        (7, {"loss": 5.5}),
    ]


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
    assert records.load(trial, tmp_path) == dataclasses.replace(old, trial=trial)
    other = dataclasses.replace(trial, optimizer=old.trial.optimizer)
    assert records.load(other, tmp_path) is None
