"""Presets of fine-tuning: the published settings, by task."""

import dataclasses

import pytest

from train import finetune
from train.config.finetune_presets import PRESETS
from train.rundir.saved_config import CONFIG_FILE, save_config


def read(*argv):
    return finetune.read([str(each) for each in argv])


def test_presets_have_the_published_settings():
    base, large = PRESETS["glue-base"], PRESETS["superglue-large"]
    for config in (base, large):
        optimizer = config.optimizer
        assert (optimizer.b1, optimizer.b2, optimizer.scale) == (0.908, 0.99, 4.0)
        assert (optimizer.schedule, optimizer.update_interval) == ("linear", 500)
        assert optimizer.final_learning_rate_fraction == 0
        assert (config.epochs, config.data.max_length_tokens) == (30, 512)
        assert config.data.batch_size_examples == 16
    assert (base.optimizer.rank, large.optimizer.rank) == (4, 8)
    assert base.init_from == "FacebookAI/roberta-base"


def test_some_settings_depend_on_the_task_unless_given():
    cola = read("--preset", "glue-base", "--task", "cola")
    assert cola.optimizer.learning_rate == 3e-5
    assert cola.data.batch_size_examples == 32
    assert read("--preset=glue-base", "--task=rte").optimizer.learning_rate == 1e-5
    given = read("--preset=glue-base", "--task=cola", "--learning-rate=2e-5")
    assert given.optimizer.learning_rate == 2e-5
    assert given.data.batch_size_examples == 32
    wsc = read("--preset", "superglue-large", "--task", "wsc")
    assert wsc.optimizer.update_interval == 250
    assert read("--task", "cola").optimizer.learning_rate == 1e-4


def test_the_optimizer_decides_on_settings_that_are_not_given():
    adamw = read("--preset", "glue-base", "--optimizer", "adamw").optimizer
    assert (adamw.b1, adamw.b2) == (0.9, 0.999)
    apollo = read("--optimizer", "apollo-mini").optimizer
    assert (apollo.scale, apollo.b1) == (None, 0.9)
    assert read("--optimizer", "galore").optimizer.scale == 4
    assert read("--optimizer", "ldadam", "--scale", 2).optimizer.scale == 2
    warm = read("--warmup-steps", 5).optimizer
    assert (warm.warmup_steps, warm.warmup_fraction) == (5, None)


@pytest.mark.parametrize(
    ("given", "epochs", "steps"),
    [
        ([], 3, 40),
        (["--epochs", 5], 5, None),
        (["--steps", 50], 3, 50),
        (["--epochs", 5, "--steps", 50], 5, 50),
    ],
)
def test_other_epochs_of_a_resumed_run_count_its_steps_anew(
    tmp_path, given, epochs, steps
):
    saved = dataclasses.replace(PRESETS["small"], steps=40, output_dir=tmp_path)
    save_config(saved, tmp_path / CONFIG_FILE)
    config = read("--resume", "--output-dir", tmp_path, *given)
    assert (config.epochs, config.steps) == (epochs, steps)
    assert config.optimizer == saved.optimizer
