"""Interleaved timing of programs on a noisy machine."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax


class Spread(NamedTuple):
    """Median and quartiles of several measurements."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    >>> spread([4.0, 1.0, 2.0, 3.0, 9.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Median and quartiles of the ratio of two programs' times within rounds.

    Load by other programs that slows all of a round cancels.

    >>> ratio([2.0, 6.0], [1.0, 3.0]).median
    2.0
    """
    return spread([a / b for a, b in zip(values, others, strict=True)])


def interleaved(
    programs: Mapping[str, Callable[[], Callable[[], object]]],
    rounds: int,
    warm_up_rounds: int = 1,
) -> dict[str, list[float]]:
    """Times programs in rounds, each program once per round.

    Args:
      programs: functions that prepare a run (not timed) and return it. The run is
        timed until the arrays that it returns are ready.
      rounds: number of timed rounds. Each starts with another program, so that no
        program always follows the same one.
      warm_up_rounds: number of rounds before, not timed.

    Returns:
      Seconds of each round, by name.
    """
    names = list(programs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(warm_up_rounds + rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            run = programs[name]()
            began = time.perf_counter()
            jax.block_until_ready(run())
            if k >= warm_up_rounds:
                seconds[name].append(time.perf_counter() - began)
    return seconds
