"""Run time of a program on a TPU, as its compiler estimates it."""

import re

_ENTRY = re.compile(r"^ENTRY .*?^}", re.MULTILINE | re.DOTALL)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def estimated_cycles(hlo: str) -> int | None:
    r"""Sums the estimates of what a program does outside of its loops.

    Of an optimizer's update that is the step which leaves subspaces where they are, if
    there is one: what moves them is a loop that makes no turn then. The estimates are
    those by which the compiler chooses between ways to do a thing; transfers that run
    beside it have none.

    Args:
      hlo: text of a compiled program.

    Returns:
      Clock cycles of one core; None from a compiler that gives no estimates.

    Example:
      >>> loop = 'body {\n x, config={"estimated_cycles":"100"}\n}\n'
      >>> rest = 'ENTRY main {\n y, config={"estimated_cycles":"7"}\n}\n'
      >>> estimated_cycles(loop + rest)
      7
    """
    entry = _ENTRY.search(hlo)
    found = _CYCLES.findall(entry[0]) if entry else []
    return sum(map(int, found)) if found else None
