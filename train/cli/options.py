"""The options of a program: the fields of its config, arranged in groups for --help.

A field is in the group that is named after its dataclass' place in the config (`data`,
`optimizer`, ...), with three exceptions. Options that the program lists as common come
first, in one group without a name; the config's other own fields follow there, too, or
as `training options` if some are common. Settings of a few optimizers alone, named in
parentheses in the field's description, as in "(galore, fira)", are `single-method
options`.
"""

import dataclasses
import os
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import docstring_parser
import tyro

from train.config.optimizer_config import OptimizerName
from train.config.rules import flag

Config = TypeVar("Config")
Path = tuple[str, ...]

SINGLE_METHOD = "single-method"
TRAINING = "training"
_DESCRIPTIONS = {
    SINGLE_METHOD: "settings of the optimizers in parentheses.",
    TRAINING: "how the run proceeds.",
}
_METHODS = frozenset(typing.get_args(OptimizerName))


class Option(NamedTuple):
    """A field of a config.

    Attributes:
      path: names of the fields that lead to it from the config, its own last.
      hint: its type, annotated for tyro.
      description: what it is, for help.
      default: its value if it is not given; MISSING if it has to be.
      place: description of the dataclass it is a field of.
    """

    path: Path
    hint: Any
    description: str
    default: Any
    place: str

    @property
    def flag(self) -> str:
        """How it is written on the command line."""
        return flag(".".join(self.path[-2:]))

    @property
    def is_hidden(self) -> bool:
        """Whether it is left out of the command line and keeps its default."""
        return tyro.conf.Suppress in getattr(self.hint, "__metadata__", ())

    @property
    def methods(self) -> frozenset[str]:
        """Optimizers named in parentheses in its description, if only a few use it."""
        found = set()
        for words in re.findall(r"\(([^()]+)\)", self.description):
            names = set(words.split(", "))
            found |= names if names <= _METHODS else set()
        return frozenset(found)


def options(kind: type, default: Any = None) -> list[Option]:
    """All fields of a config and of the dataclasses in it.

    Args:
      kind: the config's dataclass.
      default: where values come from that are not given. None: the class' defaults.
    """
    return list(_options(kind, default, (), ""))


def arrange(found: Sequence[Option], common: Sequence[str]) -> dict[str, list[Option]]:
    """Options by the name of their group, "" first.

    Args:
      found: the options.
      common: flags of those that come first, in this order.
    """
    shown = {option.flag: option for option in found if not option.is_hidden}
    groups = {"": [shown.pop(name) for name in common]}
    for option in shown.values():
        name = "" if not common else TRAINING
        if option.methods:
            name = SINGLE_METHOD
        elif len(option.path) > 1:
            name = option.path[-2]
        groups.setdefault(name, []).append(option)
    return groups


def command_line(groups: Mapping[str, Sequence[Option]]) -> type:
    """Builds the dataclass of flags that tyro turns into a command line."""
    nested = [
        (
            _attribute(name),
            Annotated[
                _dataclass(_field(option) for option in members),
                tyro.conf.arg(
                    name=name, help=_DESCRIPTIONS.get(name, members[0].place)
                ),
            ],
        )
        for name, members in groups.items()
        if name
    ]
    return _dataclass([*(_field(option) for option in groups[""]), *nested])


def values(parsed: Any, groups: Mapping[str, Sequence[Option]]) -> dict[Path, Any]:
    """Values by path, from an instance of the dataclass of `command_line`."""
    found = {
        option.path: getattr(
            getattr(parsed, _attribute(name)) if name else parsed, _field(option)[0]
        )
        for name, members in groups.items()
        for option in members
    }
    return {
        path: expanded(value) if isinstance(value, pathlib.Path) else value
        for path, value in found.items()
    }


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path with `~` replaced; shells do not replace it in `--flag=~/path`."""
    return pathlib.Path(os.path.expanduser(path))


def assemble(kind: type[Config], given: Mapping[Path, Any], path: Path = ()) -> Config:
    """Builds a config from the values of all its fields, by path.

    Raises:
      ValueError: a value is not allowed.
    """
    fields = {}
    for name, hint in _hints(kind).items():
        inner = (*path, name)
        fields[name] = (
            assemble(hint, given, inner)
            if dataclasses.is_dataclass(hint)
            else given[inner]
        )
    return kind(**fields)


def descriptions(kind: type) -> dict[str, str]:
    """The description of each field, from the docstrings of a dataclass and its bases.

    >>> from train.config.pretrain_config import SampleConfig
    >>> descriptions(SampleConfig)["sample_prompt"]
    'text to continue.'
    """
    return {
        entry.arg_name: " ".join((entry.description or "").split())
        for base in reversed(kind.__mro__)
        for entry in docstring_parser.parse(base.__doc__ or "").params
    }


def _options(kind: type, default: Any, path: Path, place: str) -> Iterator[Option]:
    described = descriptions(kind)
    for field in dataclasses.fields(kind):
        hint, inner = _hints(kind)[field.name], (*path, field.name)
        value = field.default
        if default is not None:
            value = getattr(default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        words = described.get(field.name, "")
        if dataclasses.is_dataclass(hint):
            known = None if value is dataclasses.MISSING else value
            yield from _options(hint, known, inner, words)
        else:
            yield Option(inner, hint, words, value, place)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _dataclass(fields: Iterator[Any] | Sequence[Any]) -> type:
    return dataclasses.make_dataclass("Options", fields, kw_only=True)


def _field(option: Option) -> tuple[str, Any, Any]:
    hint = Annotated[option.hint, tyro.conf.arg(help=option.description)]
    name = option.flag.removeprefix("--").replace("-", "_")
    return name, hint, dataclasses.field(default=option.default)


def _attribute(group: str) -> str:
    return f"group_{group.replace('-', '_')}"
