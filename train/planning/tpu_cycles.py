"""Estimated run time of a program on a TPU, from its compiler."""

import re

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*?^}", re.MULTILINE | re.DOTALL)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":{"n":"(\d+)"}')


def estimated_cycles(hlo: str) -> int | None:
    r"""Sums the compiler's cycle estimates of a program.

    Loops count as often as they run if that is known, as over the slices of a stack,
    and otherwise not at all. For an optimizer's update this is a step without a
    refresh, because a refresh is a loop that then has no iterations. The compiler uses
    these estimates to choose between implementations; asynchronous transfers have
    none.

    Args:
      hlo: text of a compiled program.

    Returns:
      Clock cycles of one core; None if the program has no estimates.

    Example:
      >>> refresh = 'move () {\n x, config={"estimated_cycles":"100"}\n}\n'
      >>> entry = 'ENTRY main () {\n w, body=move\n y, {"estimated_cycles":"7"}\n}\n'
      >>> estimated_cycles(refresh + entry)
      7
      >>> trips = '{"known_trip_count":{"n":"3"}}'
      >>> estimated_cycles(refresh + entry.replace("=move", f"=move, {trips}"))
      307
    """
    computations = {}
    entry = None
    for found in _COMPUTATION.finditer(hlo):
        computations[found[2]] = found[0].splitlines()[1:]
        entry = found[2] if found[1] else entry
    if entry is None or not _CYCLES.search(hlo):
        return None

    def cycles(name: str) -> int:
        total = 0
        for line in computations[name]:
            total += sum(map(int, _CYCLES.findall(line)))
            body, trips = _BODY.search(line), _TRIPS.search(line)
            if body and trips:
                total += int(trips[1]) * cycles(body[1])
        return total

    return cycles(entry)
