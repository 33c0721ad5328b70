"""Options: layout of --help, fast imports, suggestions for misspelt flags."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import typing

import pytest

from tests import common
from tests.train.program import ROOT, assert_refuses
from train import generate, pretrain
from train.cli import options
from train.comparison.comparison_config import CompareConfig
from train.config.methods import settings_of
from train.config.optimizer_config import OptimizerConfig, OptimizerName
from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.timing import benchmark_config, timed_programs

WEIGHTS = ROOT / "tests/data/hugging_face/tied"
PROGRAMS = ["pretrain", "compare", "generate", "export", "plan", "benchmark"]
# Slow to import, and not needed for help or error messages.
SLOW = ["jax", "optax", "flax", "orbax", "grain", "datasets", "matplotlib"]
SLOW += ["tokenizers", "huggingface_hub", "numpy", "tensorstore"]


def help_of(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"train.{name}").read(["--help"])
    assert stop.value.code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


def flags_by_group(text):
    """Flags in each box of a help text, by title."""
    boxes = re.split(r"^ (?:(\S+) )?options +\n -{9,}", text, flags=re.MULTILINE)
    return {
        title or "": re.findall(r"^  (--[a-z][a-z0-9-]+)", box, re.MULTILINE)
        for title, box in zip(boxes[1::2], boxes[2::2], strict=True)
    }


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *((name, "--help") for name in PROGRAMS),
        *(
            pytest.param(*name.values, "--hlep", marks=name.marks)
            for name in common.others_slow(PROGRAMS, ["pretrain"])
        ),
        ("pretrain", "--rank=0"),
        ("compare", "--optimizers=sgd"),
        ("plan", "--compare=sgd"),
        ("benchmark", "--optimizers=sgd"),
    ],
)
def test_reading_the_command_line_imports_nothing_slow(name, argument):
    code = f"""
import runpy, sys
sys.argv[1:] = [{argument!r}]
try:
    runpy.run_module("train.{name}", run_name="__main__")
finally:
    loaded = [name for name in {SLOW} if name in sys.modules]
    assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == (0 if argument == "--help" else 2), done.stderr
    assert ("usage" in done.stdout) == (argument == "--help")


def test_common_options_come_first_and_in_their_order(capsys, monkeypatch):
    groups = flags_by_group(help_of("pretrain", capsys, monkeypatch))
    first, *_ = groups
    assert first == ""
    assert groups[""] == list(pretrain.COMMON)
    assert "--z-loss-weight" in groups["training"]
    assert "--max-gradient-norm" in groups["optimizer"]
    assert "--text-field" in groups["data"]


def test_settings_of_single_methods_have_a_group(capsys, monkeypatch):
    """The description of a setting names the methods that read it."""
    found = options.options(OptimizerConfig)
    names = typing.get_args(OptimizerName)
    single = set()
    for option in found:
        readers = {
            name
            for name in names
            for schedule in ("cosine", "wsd")
            if option.path[-1] in settings_of(OptimizerConfig(name, schedule=schedule))
        }
        if 0 < len(readers) < 4:
            single.add(option.flag)
            assert option.methods == readers, option.flag
        else:
            assert not option.methods, option.flag
    for name in ("pretrain", "compare", "plan"):
        groups = flags_by_group(help_of(name, capsys, monkeypatch))
        assert set(groups["single-method"]) == single


def test_a_new_field_is_in_the_group_of_its_dataclass():
    nested = options.Option(("data", "new"), int, "something.", 1, "the text.")
    own = nested._replace(path=("new_too",))
    of_one = nested._replace(path=("optimizer", "x"), description="it (galore, fira).")
    groups = options.arrange([nested, own, of_one], ["--new"])
    assert groups == {"": [nested], "training": [own], "single-method": [of_one]}
    groups = options.arrange([nested, own], [])
    assert groups == {"": [own], "data": [nested]}


def test_fields_that_are_no_options_keep_their_default():
    found = options.options(CompareConfig)
    shown = options.arrange(found, [])["settings"]
    assert "--learning-rate" in {option.flag for option in found}
    assert "--learning-rate" not in {option.flag for option in shown}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_ends_with_examples_that_can_be_read(capsys, monkeypatch, tmp_path, name):
    # Files that the examples name must exist.
    shutil.copytree(WEIGHTS, tmp_path / "path/to/llama")
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module(f"train.{name}")
    text = help_of(name, capsys, monkeypatch)
    *_, last = text.split("\nexamples:\n")
    commands = re.findall(r"^ {6}python -m train\.\w+(.*)", last, re.MULTILINE)
    assert commands == [f" {e.arguments}".rstrip() for e in program.EXAMPLES]
    for command in commands:
        program.read(shlex.split(command))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hlep"], "unknown option --hlep: did you mean --help?"),
        (["--lerning-rate", "3"], "--lerning-rate: did you mean --learning-rate?"),
        (["--lerning_rate=3"], "--lerning_rate: did you mean --learning-rate?"),
        (["-rank", "3"], "unknown option -rank: did you mean --rank?"),
        (["--step", "3"], "unknown option --step: did you mean --steps?"),
        (["--no-error-feedbak"], "did you mean --no-error-feedback?"),
        (["--no-wandb"], "unknown option --no-wandb: did you mean --wandb?"),
        (["--steps", "3", "--frobnicate"], "unknown option --frobnicate: see --help"),
        (["--STEPS", "3"], "unknown option --STEPS: did you mean --steps?"),
        (["\N{EM DASH}steps", "3"], "did you mean --steps?"),
        (["--lr", "3"], "unknown option --lr: did you mean --learning-rate?"),
        (["--version"], "unknown option --version: see --help"),
        (["--preset", "llama"], "llama-60m"),
        (["--steps", "1e3"], "--steps takes a whole number, got '1e3'"),
        (["--rank", "8.0"], "--rank takes a whole number or None, got '8.0'"),
        (["--learning-rate", "0,1"], "--learning-rate takes a number, got '0,1'"),
        (["--resume=true"], "--resume takes no value, got true"),
        (["--resume", "true", "--seed", "1"], "for a no leave it out"),
        (["--keep-best", "False"], "for a no give --no-keep-best"),
        (["--output-dir", ""], "--output-dir must not be empty"),
        (["--data_glob="], "--data-glob must not be empty"),
        (["--init-from", ""], "--init-from must not be empty"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(capsys, argv, message):
    assert_refuses(pretrain.read, capsys, argv, message)


def test_of_an_option_given_twice_the_last_counts(capsys):
    """As in other programs: scripts append flags to a given command."""
    argv = "--steps 3 --keep-best --seed 1 --seed=1 --no_keep_best --steps=4"
    config = pretrain.read(argv.split())
    assert (config.steps, config.checkpoint.keep_best) == (4, False)
    assert capsys.readouterr().err == ""


def test_a_prompt_may_be_empty():
    assert generate.read(["--checkpoint", "x", "--prompt", ""]).prompt == ""


def test_the_names_of_the_benchmark_are_those_of_its_methods():
    assert set(benchmark_config.NAMES) == set(timed_programs.METHODS)


def test_values_reach_their_fields():
    config = pretrain.read(["--rank", "7", "--optimizer", "galore"])
    assert isinstance(config, PretrainConfig)
    assert (config.optimizer.rank, config.optimizer.name) == (7, "galore")
    assert config.model == PRESETS["tiny"].model
