"""Estimated run time of a program on a TPU, from its compiler."""

import re

_ENTRY = re.compile(r"^ENTRY .*?^}", re.MULTILINE | re.DOTALL)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def estimated_cycles(hlo: str) -> int | None:
    r"""Sums the compiler's cycle estimates of a program outside of its loops.

    For an optimizer's update this is a step without a refresh, because a refresh is a
    loop that then has no iterations. The compiler uses these estimates to choose
    between implementations; asynchronous transfers have none.

    Args:
      hlo: text of a compiled program.

    Returns:
      Clock cycles of one core; None if the program has no estimates.

    Example:
      >>> loop = 'body {\n x, config={"estimated_cycles":"100"}\n}\n'
      >>> rest = 'ENTRY main {\n y, config={"estimated_cycles":"7"}\n}\n'
      >>> estimated_cycles(loop + rest)
      7
    """
    entry = _ENTRY.search(hlo)
    found = _CYCLES.findall(entry[0]) if entry else []
    return sum(map(int, found)) if found else None
