"""Warnings about disk space for a run's checkpoints, before training."""

import dataclasses
import shutil
import types

import pytest

from train.config.presets import PRESETS
from train.config.run_config import CheckpointConfig
from train.rundir import disk_space

STATE_BYTES = 10_000_000


def check(tmp_path, monkeypatch, free_mb, first=0, present=(), **settings):
    """Returns the warnings of a run of 1,000 steps."""
    for step, size in enumerate(present):
        (tmp_path / "checkpoints" / str(step) / "params").mkdir(parents=True)
        path = tmp_path / "checkpoints" / str(step) / "params" / "file"
        path.write_bytes(bytes(size))
    usage = types.SimpleNamespace(free=free_mb * 1e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    settings = {"keep_best": False, "keep_last_checkpoints": 2} | settings
    config = dataclasses.replace(
        PRESETS["tiny"],
        steps=1000,
        eval_every_steps=100,
        output_dir=tmp_path,
        checkpoint=CheckpointConfig(**settings),
    )
    warnings = []
    disk_space.check(config, first, STATE_BYTES, warnings.append)
    return warnings


@pytest.mark.parametrize(
    ("needed_mb", "settings"),
    [
        # Those to keep, plus the new one before the oldest is deleted.
        (30, {}),
        (20, {"keep_last_checkpoints": 1}),
        (40, {"keep_best": True}),
        (80, {"keep_checkpoint_every_steps": 200}),
        # At most as many as the run writes.
        (10, {"checkpoint_every_steps": 1000}),
        (20, {"keep_last_checkpoints": 9, "checkpoint_every_steps": 500}),
        # Existing checkpoints give the size.
        (20, {"present": [10_000_000]}),
        (7, {"present": [7_000_000] * 2, "first": 900}),
        (0, {"first": 1000}),
    ],
)
def test_what_all_checkpoints_need(tmp_path, monkeypatch, needed_mb, settings):
    assert check(tmp_path, monkeypatch, needed_mb + 0.01, **settings) == []
    if needed_mb > 10:
        other = tmp_path / "other"
        (warning,) = check(other, monkeypatch, needed_mb - 0.01, **settings)
        assert f"up to {needed_mb}.0 MB more in {other / 'checkpoints'}" in warning
        assert f"where {needed_mb - 0.01:.1f} MB are free" in warning


@pytest.mark.parametrize("present", [[], [8_000_000]])
def test_without_space_for_one_nothing_begins(tmp_path, monkeypatch, present):
    one = 8.0 if present else 10.0
    message = f"a checkpoint takes {one} MB in {tmp_path / 'checkpoints'}, where 6.9 MB"
    with pytest.raises(OSError, match=message):
        check(tmp_path, monkeypatch, 6.9, present=present)
