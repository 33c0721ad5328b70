"""What the programs' command lines share: presets, and errors of one line."""

import argparse
import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

import tyro

Config = TypeVar("Config")


def parse(
    presets: Mapping[str, Config], default: str, program: str, argv: Sequence[str]
) -> Config:
    """Reads a config from the command line, on top of the preset it names.

    `--help` exits with code 0 and shows the values of the chosen preset; a bad
    value exits with code 2 and one line on stderr.

    Args:
      presets: a config by each name that `--preset` takes, all of one dataclass
        with a field `preset`; nested dataclasses lend their fields without prefix.
      default: the preset used when none is named.
      program: the command, for help and errors.
      argv: the arguments behind the command.
    """
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", nargs="?")
    name = chooser.parse_known_args(argv)[0].preset
    # A name that is no preset is reported by tyro, which knows the choices.
    preset = presets.get(name, presets[default])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(preset),
                prog=program,
                args=argv,
                default=preset,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            fail(_unboxed(errors.getvalue()))
        raise


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the ValueErrors and OSErrors a user can cause into `fail`."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Ends the program with exit code 2 and one line on stderr."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _unboxed(report: str) -> str:
    """The message of tyro's error box, without its title, frame and advice."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", report)
    _, *lines = (line.strip("│ ") for line in plain.splitlines())
    # Where stdout is not UTF-8 the box has no sides, and a rule under its title.
    rule = re.compile("[─-]{4,}|╰.*")
    if rule.fullmatch(lines[0]):
        del lines[0]
    message = itertools.takewhile(lambda line: not rule.fullmatch(line), lines)
    # The config classes name the flag themselves.
    return re.sub(r"^Error parsing \w+: ", "", " ".join(message))
