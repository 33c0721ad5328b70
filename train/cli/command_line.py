"""Command lines of the programs: presets, saved configs, and errors of one line."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import tyro

from train.cli import mistakes, options
from train.rundir.saved_config import CONFIG_FILE, load_config
from train.system import console

Config = TypeVar("Config")


class Example(NamedTuple):
    """A command line shown by --help: its purpose and its arguments."""

    purpose: str
    arguments: str


class Origins(NamedTuple):
    """Flags that decide where all other values come from, as they were given."""

    preset: str | None = None
    config: str | None = None
    output_dir: str | None = None
    init_from: str | None = None
    resume: bool | str | None = None
    task: str | None = None
    epochs: str | None = None
    steps: str | None = None
    optimizer: str | None = None
    warmup_steps: str | None = None


def with_given_lengths(base: Any, given: Origins) -> Any:
    """A base without the steps that given epochs, or a given warm-up, replace.

    Args:
      base: a config of fine-tuning.
      given: the flags.
    """
    if given.warmup_steps is not None:
        optimizer = dataclasses.replace(base.optimizer, warmup_fraction=None)
        base = dataclasses.replace(base, optimizer=optimizer)
    is_saved = given.resume or given.config
    if is_saved and given.epochs is not None and given.steps is None:
        # Saved steps were counted with the saved epochs.
        base = dataclasses.replace(base, steps=None)
    return base


def parse(
    presets: Mapping[str, Config],
    default: str,
    program: str,
    argv: Sequence[str],
    adapt: Callable[[Any, Origins], Any] | None = None,
    **help_layout: Any,
) -> Config:
    """Reads a config from the command line, on top of a preset or a saved config.

    `--preset` names the values to start from, `--config` a file with them,
    `--resume` the file in `--output-dir`. `--help` exits with code 0 and shows these
    values; a bad one exits with code 2 and one line on stderr.

    Args:
      presets: a config by each name that `--preset` takes, all of one dataclass
        with the fields `preset`, `output_dir` and `start`; nested dataclasses lend
        their fields without prefix.
      default: the preset used when none is named.
      program: the command, for help and errors.
      argv: the arguments behind the command.
      adapt: replaces values to start from, given the flags that decide on them.
      **help_layout: `common` and `examples`, as in `read`.
    """
    given = _origins(argv)
    # tyro reports an unknown preset, and lists the known ones.
    base = presets.get(given.preset, presets[default])
    with console.user_errors(ValueError, OSError):
        if given.config and (given.preset or given.resume):
            raise ValueError(
                "--config has the values of --preset and --resume: give one of them"
            )
        if given.config:
            base = load_config(type(base), options.expanded(given.config))
        elif given.resume:
            saved = options.expanded(given.output_dir or base.output_dir) / CONFIG_FILE
            # A missing file is reported when the directory is opened.
            base = load_config(type(base), saved) if saved.exists() else base
        if adapt is not None:
            base = adapt(base, given)
    return read(type(base), program, argv, base, **help_layout)


def run_of_preset(argv: Sequence[str], presets: Mapping[str, Config]) -> Config:
    """The run that `--preset` names; "tiny" without it or with an unknown name."""
    return presets.get(_origins(argv).preset, presets["tiny"])


def _origins(argv: Sequence[str]) -> Origins:
    """The flags that decide where all other values come from.

    Parsed ahead, as tyro needs the default values before it parses: its own presets
    are subcommands, which exclude `--preset NAME` in any place, saved configs and
    `--resume`. A flag without its value is refused later, in one line.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in Origins._fields:
        # tyro takes underscores, too.
        names = {"--" + field.replace("_", "-"), "--" + field}
        const = True if field == "resume" else None
        parser.add_argument(*names, nargs="?", const=const, dest=field)
    return Origins(**vars(parser.parse_known_args(argv)[0]))


def read(
    kind: type[Config],
    program: str,
    argv: Sequence[str],
    default: Config | None = None,
    common: Sequence[str] = (),
    examples: Sequence[Example] = (),
) -> Config:
    """Reads a dataclass from the command line, with errors as in `parse`.

    Args:
      kind: the dataclass; nested ones lend their fields without prefix.
      program: the command, for help and errors.
      argv: the arguments behind the command.
      default: where values not given come from; None takes the dataclass' own.
      common: flags that help shows first; see `train.cli.options`.
      examples: command lines that help ends with.
    """
    found = options.options(kind, default)
    groups = options.arrange(found, common)
    shown = [option for option in found if not option.is_hidden]
    if message := mistakes.empty(argv, shown):
        console.fail(message)
    errors = io.StringIO()
    flags = options.command_line(groups)
    try:
        with (
            console.user_errors(OSError),  # a full disk behind the standard output
            console.reader_may_leave(),
            contextlib.redirect_stderr(errors),
        ):
            parsed = _parse(flags, kind, program, argv, examples)
    except console.Failure:
        raise
    except SystemExit as stop:
        if stop.code:
            known = mistakes.explain(argv, shown)
            console.fail(known or mistakes.in_plain_words(_unboxed(errors.getvalue())))
        raise
    given = {option.path: option.default for option in found}
    with console.user_errors(ValueError):
        return options.assemble(kind, given | options.values(parsed, groups))


def _parse(
    flags: type,
    kind: type,
    program: str,
    argv: Sequence[str],
    examples: Sequence[Example],
) -> Any:
    try:
        return tyro.cli(
            flags,
            prog=program,
            description=inspect.getdoc(kind).partition("\n\nAttributes:")[0],
            args=argv,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as stop:
        if not stop.code and examples and {"-h", "--help"} & set(argv):
            print("\nexamples:")
            for example in examples:
                print(f"  {example.purpose}:")
                print(f"      {program} {example.arguments}".rstrip())
        raise


def _unboxed(report: str) -> str:
    """The message of tyro's error box, without its title, frame and advice.

    tyro has no public access to the message: its hook for parse errors is in a module
    that it declares private and unstable.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", report)
    _, *lines = (line.strip("│ ") for line in plain.splitlines())
    # Where stdout is not UTF-8, the box has a rule under its title and no sides.
    rule = re.compile("[─-]{4,}|╰.*")
    if rule.fullmatch(lines[0]):
        del lines[0]
    message = itertools.takewhile(lambda line: not rule.fullmatch(line), lines)
    # The message of a config class names the flag already.
    return re.sub(r"^Error parsing \w+: ", "", " ".join(message))
