"""Validation of numbers and names in a configuration; errors name the flag."""

import difflib
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Condition on one number, and its description. NaN meets no condition."""

    holds: Callable[[float], bool]
    words: str


positive = Rule(lambda x: 0 < x < math.inf, "positive and finite")
positive_or_inf = Rule(lambda x: x > 0, "positive")
not_negative = Rule(lambda x: 0 <= x < math.inf, "at least 0 and finite")
at_least_1 = Rule(lambda x: x >= 1, "at least 1")
between_0_and_1 = Rule(lambda x: 0 < x < 1, "above 0 and below 1")
from_0_below_1 = Rule(lambda x: 0 <= x < 1, "at least 0 and below 1")
from_0_to_1 = Rule(lambda x: 0 <= x <= 1, "from 0 to 1")
above_0_to_1 = Rule(lambda x: 0 < x <= 1, "above 0 and at most 1")
quarter_turn = Rule(lambda x: 0 < x <= 1.57, "above 0 and at most 1.57")
steps_of_32_bits = Rule(lambda x: 1 <= x < 2**31, "at least 1 and below 2^31")
fits_32_bits = Rule(lambda x: 0 <= x < 2**32, "at least 0 and below 2^32")


def flag(field: str) -> str:
    """Flag of a field, whose name may include its group: optimizer.b1."""
    group, _, name = field.rpartition(".")
    if (group, name) == ("optimizer", "name"):
        return "--optimizer"
    return "--" + name.replace("_", "-")


def check_name(where: str, name: str, known: Collection[str]) -> None:
    """Raises a ValueError for an unknown name; lists known names, closest first.

    Args:
      where: the flag and its value.
      name: the name in it.
      known: valid names.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"{where}: unknown {name!r}{hint}: choose from {', '.join(known)}")


def check(config: Any, rule: Rule, *fields: str) -> None:
    """Raises a ValueError that names the flag of the first field that breaks a rule.

    None breaks no rule; each value of a tuple is checked.
    """
    for field, given in ((field, getattr(config, field)) for field in fields):
        for value in given if isinstance(given, tuple) else (given,):
            if value is None or rule.holds(value):
                continue
            raise ValueError(f"{flag(field)} must be {rule.words}, got {value}")
