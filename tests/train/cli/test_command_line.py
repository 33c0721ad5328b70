"""Command line: precedence of presets, files and flags; help; errors."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import shlex
import sys

import pytest

from tests.train.program import assert_refuses
from train.cli import command_line
from train.config import rules
from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.export import ExportConfig
from train.export import main as export_main
from train.generate import GenerateConfig
from train.generate import main as generate_main
from train.loop import messages
from train.rundir.saved_config import CONFIG_FILE, save_config
from train.system import console
from train.system.files import WriteError


def parse(*argv):
    return command_line.parse(PRESETS, "tiny", "pretrain", [str(arg) for arg in argv])


@pytest.fixture
def saved(tmp_path):
    """A saved config of llama-60m with changed values."""
    preset = PRESETS["llama-60m"]
    config = dataclasses.replace(
        preset,
        steps=77,
        output_dir=tmp_path / "run",
        optimizer=dataclasses.replace(preset.optimizer, rank=5, b1=0.5),
    )
    config.output_dir.mkdir()
    save_config(config, config.output_dir / CONFIG_FILE)
    return config


def without_start(config):
    return dataclasses.replace(config, start=PRESETS["tiny"].start)


def test_a_config_file_replaces_the_preset(saved):
    path = saved.output_dir / CONFIG_FILE
    config = parse("--config", path)
    assert config.start.config == path
    assert without_start(config) == saved


def test_flags_count_more_than_the_config_file(saved):
    path = saved.output_dir / CONFIG_FILE
    config = parse("--rank", 9, "--config", path, "--output-dir", "other")
    assert without_start(config) == dataclasses.replace(
        saved,
        output_dir=pathlib.Path("other"),
        optimizer=dataclasses.replace(saved.optimizer, rank=9),
    )


@pytest.mark.parametrize("flag", ["--output-dir", "--output_dir"])
@pytest.mark.parametrize("joined", [False, True])
def test_resuming_takes_the_values_saved_there(saved, flag, joined):
    place = [f"{flag}={saved.output_dir}"] if joined else [flag, saved.output_dir]
    config = parse("--resume", *place)
    assert config.start.resume
    assert without_start(config) == saved


def test_flags_count_more_than_the_values_resumed(saved):
    config = parse("--resume", "--output-dir", saved.output_dir, "--steps", 80)
    assert without_start(config) == dataclasses.replace(saved, steps=80)


def test_resuming_in_the_directory_of_the_default(saved, monkeypatch):
    place = saved.output_dir.parent / PRESETS["tiny"].output_dir
    place.mkdir(parents=True)
    save_config(saved, place / CONFIG_FILE)
    monkeypatch.chdir(saved.output_dir.parent)
    assert parse("--resume").steps == saved.steps


def test_resuming_where_nothing_is_is_left_to_who_opens_it(tmp_path):
    config = parse("--resume", "--output-dir", tmp_path / "none")
    assert config.start.resume
    assert config.output_dir == tmp_path / "none"


def assert_error(capsys, argv, *messages):
    assert_refuses(lambda argv: parse(*argv), capsys, argv, *messages)


@pytest.mark.parametrize("flag", ["--data-glob", "--data_glob", "--eval-glob"])
def test_a_pattern_that_the_shell_replaced_is_told(capsys, flag):
    argv = ["--steps", "3", flag, "a.txt", "b.txt", "c.txt", "--seed", "1"]
    message = f"{flag.replace('_', '-')} takes one pattern, and got 3 files, a.txt, b.t"
    assert_error(capsys, argv, message, "put the pattern in quotes")


@pytest.mark.parametrize("other", [["--preset", "llama-60m"], ["--resume"]])
def test_values_from_two_places_are_refused(capsys, saved, other):
    argv = ["--config", saved.output_dir / CONFIG_FILE, *other]
    assert_error(capsys, argv, "--config has the values of --preset and --resume")


def test_a_config_that_is_not_there_is_named(capsys, tmp_path):
    argv = ["--config", tmp_path / "none.json"]
    assert_error(capsys, argv, str(tmp_path / "none.json"), "No such file")
    assert_error(capsys, ["--config", tmp_path], "Is a directory")


@pytest.mark.parametrize("how", ["--config", "--resume"])
def test_a_config_of_another_version_is_named(capsys, saved, how):
    path = saved.output_dir / CONFIG_FILE
    values = json.loads(path.read_text())
    del values["optimizer"]["rank"]
    path.write_text(json.dumps(values))
    argv = [how, path] if how == "--config" else [how, "--output-dir", path.parent]
    assert_error(capsys, argv, str(path), "optimizer.rank")


def test_a_config_with_a_bad_value_is_named(capsys, saved):
    path = saved.output_dir / CONFIG_FILE
    path.write_text(path.read_text().replace('"steps": 77', '"steps": -77'))
    assert_error(capsys, ["--config", path], str(path), "--steps must be at least 1")
    path.write_text("[" * 100_000)  # deeper than Python's recursion limit
    assert_error(capsys, ["--config", path], f"{path} is not a saved config")


def flags_of(kind, default=None):
    """All fields that become flags: (group, name, value shown, MISSING if none)."""
    for field in dataclasses.fields(kind):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        value = getattr(default, field.name, value)
        if dataclasses.is_dataclass(value):
            yield from flags_of(type(value), value)
        else:
            yield kind, field.name, value


def described(kind):
    """Descriptions of all fields in the docstrings of a class and its bases."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        text = re.split(r"Attributes:\n", base.__doc__)[1].split("\n\n")[0]
        entries = re.split(r"\n {6}(?=\w+: )", "\n" + text.rstrip())[1:]
        for name, description in (entry.split(":", 1) for entry in entries):
            found[name] = " ".join(description.split())
    return found


def help_of(capsys, monkeypatch, call):
    monkeypatch.setenv("COLUMNS", "100")  # wide enough for one column
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return re.sub(r"\x1b\[[0-9;]*m", "", out)


def assert_helps(help_text, kind, default=None):
    lines = [" ".join(line.strip("│ ").split()) for line in help_text.splitlines()]
    words = " ".join(filter(None, lines))
    for group, name, value in flags_of(kind, default):
        group_name = group.__name__.removesuffix("Config").lower()
        flag = rules.flag(f"{group_name}.{name}")
        # Only where a description is not wrapped before another flag.
        usage_of = re.compile(rf"{flag}(,|$| [^a-z])")
        (line,) = filter(usage_of.match, lines)
        description = described(group)[name]
        assert description
        entry = words[words.index(line) :]
        usage, found, rest = entry.partition(description)
        assert found, f"{flag} is not described"
        assert " --" not in usage.replace(", --no-", "")
        shown = re.match(r" \((?:default: ([^)]*)|required)\)", rest)
        assert shown, f"{flag} does not show its value: {rest[:40]}"
        told = shown[1] and shown[1].strip("'\"")
        assert told == (None if value is dataclasses.MISSING else str(value)), flag


@pytest.mark.parametrize("preset", ["tiny", "llama-1b"])
def test_help_shows_every_flag_with_its_value(capsys, monkeypatch, preset):
    text = help_of(capsys, monkeypatch, lambda: parse("--preset", preset, "--help"))
    assert_helps(text, PretrainConfig, PRESETS[preset])


def test_help_shows_the_values_of_a_config_file(capsys, monkeypatch, saved):
    argv = ["--config", saved.output_dir / CONFIG_FILE]
    text = help_of(capsys, monkeypatch, lambda: parse(*argv, "--help"))
    assert "(default: 77)" in text
    assert "(default: 0.5)" in text


@pytest.mark.parametrize(
    ("main", "kind"),
    [(generate_main, GenerateConfig), (export_main, ExportConfig)],
    ids=["generate", "export"],
)
def test_help_of_the_other_programs(capsys, monkeypatch, main, kind):
    text = help_of(capsys, monkeypatch, lambda: main(["--help"]))
    assert_helps(text, kind)


@pytest.mark.parametrize("buffer_bytes", [1, 2**20])
def test_help_that_is_not_read_to_its_end_is_no_error(
    capsys, monkeypatch, buffer_bytes
):
    """Like `| head`: the pipe breaks in the middle or at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=buffer_bytes) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            parse("--help")
        assert stop.value.code == 0
        pipe.flush()  # as Python does at exit
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), "cannot write to stdout: No sp"),
        (
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            "cannot write to stdout: B",
        ),
        (
            WriteError(errno.ENOSPC, "No space left", "a"),
            "cannot write a: No space left",
        ),
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (OSError("cannot read a: torn"), "cannot read a: torn"),
    ],
)
def test_an_error_of_the_disk_says_what_cannot_be_written(capsys, error, message):
    with pytest.raises(SystemExit), console.user_errors(OSError):
        raise error
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    advice = ": free some space and run the same command again\n"
    assert err.endswith(advice) == (error.errno == errno.ENOSPC)


def test_commands_to_copy_keep_a_path_together():
    config = dataclasses.replace(PRESETS["tiny"], output_dir=pathlib.Path("a b/it's"))
    _, *lines = messages.farewell(config).splitlines()
    for line in lines:
        assert {"a b/it's", f"a b/it's/{CONFIG_FILE}"} & set(shlex.split(line))


def test_help_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", FullDisk())
    assert_refuses(export_main, capsys, ["--help"], "cannot write to stdout: No")
