"""Messages about mistakes on a command line: misspelt and empty options."""

import difflib
import itertools
import re
from collections.abc import Sequence

from train.cli.options import Option

# Word processors and web pages replace hyphens by en and em dashes.
_DASHES = "-\N{EN DASH}\N{EM DASH}"
_FLAG = re.compile(f"[{_DASHES}]{{1,2}}[a-zA-Z]")
_NUMBER = re.compile(
    r"(Error parsing )?(?P<flag>--\S+): .*"
    r"(?P<whole>invalid literal for int|could not convert string to float).*: "
    r"(?P<value>'.*')"
)


def explain(argv: Sequence[str], options: Sequence[Option]) -> str | None:
    """Message about a refused command line; None if the cause is unknown."""
    return _unquoted(argv) or _misspelt(argv, options) or _valued(argv, options)


def empty(argv: Sequence[str], options: Sequence[Option]) -> str | None:
    """Message about an empty value, such as an unset shell variable.

    An option whose description has '' takes one.
    """
    flags = _flags(options)
    for argument, following in itertools.pairwise([*argv, "-"]):
        name, equals, value = argument.partition("=")
        option = flags.get(name.replace("_", "-"))
        if option is None or "''" in option.description:
            continue
        if (value if equals else following) == "":
            return f"{option.flag} must not be empty"
    return None


def in_plain_words(message: str) -> str:
    """Rewrites a parser's error about numbers without Python's wording.

    >>> in_plain_words("--b1: could not convert string to float: 'x'")
    "--b1 takes a number, got 'x'"
    """
    number = _NUMBER.fullmatch(message)
    if number is None:
        return message
    kind = "a whole number" if number["whole"].startswith("inv") else "a number"
    none = " or None" if "{None}" in message else ""
    return f"{number['flag']} takes {kind}{none}, got {number['value']}"


def _flags(options: Sequence[Option]) -> dict[str, Option]:
    """Options by flag, including the `--no-` form of booleans."""
    flags = {}
    for option in options:
        flags[option.flag] = option
        if option.hint is bool:  # not a Switch
            flags[f"--no-{option.flag[2:]}"] = option
    return flags


def _is_switch(option: Option) -> bool:
    return bool in (option.hint, getattr(option.hint, "__origin__", None))


def _unquoted(argv: Sequence[str]) -> str | None:
    """Message about an unquoted pattern that the shell expanded to many files."""
    for index, argument in enumerate(argv, start=1):
        flag = argument.replace("_", "-")
        is_value = lambda following: not following.startswith("-")
        files = list(itertools.takewhile(is_value, argv[index:]))
        if flag in ("--data-glob", "--eval-glob") and len(files) > 1:
            return (
                f"{flag} takes one pattern, and got {len(files)} files, {files[0]}, "
                f"{files[1]}{', ...' * (len(files) > 2)}: put the pattern in quotes, "
                "or the shell replaces it by the files that match"
            )
    return None


def _misspelt(argv: Sequence[str], options: Sequence[Option]) -> str | None:
    """Message about the first unknown flag on the command line."""
    known = {"-h", "--help", *_flags(options)}
    for argument in argv:
        name = argument.partition("=")[0]
        if _FLAG.match(name) and name.replace("_", "-") not in known:
            near = _nearest(name, known)
            advice = f"did you mean {near}?" if near else "see --help"
            return f"unknown option {name}: {advice}"
    return None


def _nearest(name: str, known: set[str]) -> str | None:
    """The flag most similar to a name, or with these initials, as in --lr."""
    words = {flag.strip("-"): flag for flag in sorted(known)}
    word = name.strip(_DASHES).replace("_", "-").lower()
    for candidate, flag in words.items():
        if "".join(part[0] for part in candidate.split("-")) == word:
            return flag
    near = difflib.get_close_matches(word, words, n=1)
    return words[near[0]] if near else None


def _valued(argv: Sequence[str], options: Sequence[Option]) -> str | None:
    """Message about a switch that is given a value, as in --resume true."""
    flags = _flags(options)
    for argument, following in itertools.pairwise([*argv, "-"]):
        name, equals, value = argument.partition("=")
        option = flags.get(name.replace("_", "-"))
        is_valued = equals or not following.startswith("-")
        if option is None or not _is_switch(option) or not is_valued:
            continue
        no = f"give --no-{option.flag[2:]}" if option.hint is bool else "leave it out"
        return (
            f"{name} takes no value, got {value if equals else following}: by itself "
            f"it is a yes; for a no {no}"
        )
    return None
