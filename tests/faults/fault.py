"""Seeded fault: an old text, a new one, tests."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault and the tests of which at least one has to fail.

    Attributes:
      name: what the fault does.
      old: text that stands exactly once in library, models and programs.
      new: text in its place.
      tests: paths or ids of tests.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


def fault(name: str, old: str, new: str, *tests: str) -> Fault:
    """Creates a fault from its tests, one by one."""
    return Fault(name, old, new, tests)
