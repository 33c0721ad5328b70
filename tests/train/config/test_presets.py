"""Presets, flags on top of them, and bad values."""

import dataclasses
import typing

import pytest

from models.llama import PRESETS as MODELS
from train.cli import command_line
from train.config.methods import resolved
from train.config.optimizer_config import OptimizerName, schedule_phases
from train.config.presets import PRESETS
from train.config.pretrain_config import PresetName
from train.step import optimizers


def parse(*argv):
    return command_line.parse(PRESETS, "tiny", "pretrain", argv)


def test_no_arguments_mean_the_tiny_preset():
    assert parse() == PRESETS["tiny"]
    assert PRESETS["tiny"].optimizer.name == "subtrack"


@pytest.mark.parametrize("argv", [["--preset", "llama-60m"], ["--preset=llama-60m"]])
def test_flags_override_the_preset_wherever_it_stands(argv):
    config = parse("--rank", "7", *argv, "--optimizer", "galore", "--num-layers", "2")
    preset = PRESETS["llama-60m"]
    assert config == dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, num_layers=2),
        optimizer=dataclasses.replace(preset.optimizer, name="galore", rank=7),
    )


@pytest.mark.parametrize(
    ("name", "rank", "interval", "learning_rate", "batch"),
    [
        ("llama-60m", 128, 200, 1e-3, 256),
        ("llama-130m", 256, 200, 1e-3, 256),
        ("llama-350m", 256, 200, 1e-3, 128),
        ("llama-1b", 512, 200, 1e-4, 16),
        ("llama-3b", 512, 200, 1e-4, 16),
        ("llama-7b", 1024, 500, 1e-4, 16),
    ],
)
def test_published_settings(name, rank, interval, learning_rate, batch):
    config = PRESETS[name]
    assert config.optimizer.rank == rank
    assert config.optimizer.update_interval == interval
    assert config.optimizer.learning_rate == learning_rate
    assert config.data.batch_size_sequences == batch
    assert config.data.sequence_length_tokens == 256
    assert schedule_phases(config.optimizer, config.steps) == (1_000, 0, 9_000)
    settings = resolved(config.optimizer)
    assert (settings.schedule, settings.final_learning_rate_fraction) == ("cosine", 0.1)
    assert (settings.b1, settings.b2, settings.eps) == (0.9, 0.999, 1e-6)
    assert (settings.scale, settings.growth_limit) == (0.25, 1.01)
    assert config.model.dtype == config.model.param_dtype == "bfloat16"


def test_names_that_can_be_typed_are_the_names_there_are():
    assert set(typing.get_args(PresetName)) == set(PRESETS) == {"tiny", *MODELS}
    for name in typing.get_args(OptimizerName):
        settings = dataclasses.replace(PRESETS["tiny"].optimizer, name=name)
        optimizers.make_optimizer(settings, 1e-3, seed=0)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--rank", "0"),
        ("--rank", "many"),
        ("--rank", None),
        ("--steps", "0"),
        ("--steps", "-3"),
        ("--steps", "10000000000"),
        ("--gradient-accumulation-steps", "3"),
        ("--z-loss-weight", "-1"),
        ("--max-skipped-steps-in-a-row", "0"),
        ("--checkpoint-every-steps", "0"),
        ("--keep-last-checkpoints", "0"),
        ("--keep-checkpoint-every-steps", "0"),
        ("--peak-teraflops", "0"),
        ("--packing", "loose"),
        ("--eval-tokens", "0"),
        ("--shuffle-buffer-documents", "0"),
        ("--eval-every-steps", "0"),
        ("--seed", "-1"),
        ("--optimizer", "sgd"),
        ("--preset", "llama-8b"),
        ("--preset", None),
        ("--learning-rate", "-1"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "inf"),
        ("--update-interval", "0"),
        ("--update-interval", "2147483648"),
        ("--schedule", "step"),
        ("--warmup-steps", "-1"),
        ("--warmup-steps", "301"),
        ("--decay-fraction", "0.2"),
        ("--b2", "1"),
        ("--eps", "0"),
        ("--growth-limit", "0.5"),
        ("--step-size", "0"),
        ("--damping", "1.5"),
        ("--angle", "2"),
        ("--matrix-learning-rate-scale", "0"),
        ("--transport", "maybe"),
        ("--weight-decay", "-0.1"),
        ("--warmup-fraction", "2"),
        ("--max-gradient-norm", "0"),
        ("--held-out-fraction", "1"),
        ("--sequence-length-tokens", "0"),
        ("--batch-size-sequences", "0"),
        ("--num-heads", "3"),
        ("--sample-length-tokens", "0"),
        ("--sample-temperature", "-1"),
        ("--sample-prompt", ""),
    ],
)
def test_bad_values_end_in_one_line_that_names_the_flag(capsys, flag, value):
    argv = [flag] if value is None else [flag, value]
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert flag.strip("-").replace("-", "_") in err.replace("-", "_")
    if value:
        assert value in err
    assert "--help" not in err


@pytest.mark.parametrize(
    "box",
    [
        """\
╭─ Value error ──────────╮
│ Error parsing data:    │
│ --rank must be so      │
│ ────────────────────── │
│ For help, see --help   │
╰────────────────────────╯
""",
        """\
 Value error
 -------------------------
  Error parsing data:
  --rank must be so
  ------------------------
  For help, see --help
""",
        "\x1b[31m╭ Error ───╮\x1b[0m\n│ \x1b[1m--rank must\x1b[0m be so │\n╰───────╯",
    ],
    ids=["utf-8", "ascii", "colours"],
)
def test_frames_and_advice_are_left_out(box):
    assert command_line._unboxed(box) == "--rank must be so"


def test_help_shows_the_values_of_the_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset", "llama-7b", "--help")
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert "11008" in out
    assert err == ""
