"""Outcomes of trials: losses over seeds, and the best rates of each variant."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from train.comparison.trial_records import Record, finite, step_kinds
from train.config.methods import resolved

RATES = ("learning_rate", "matrix_scale")


@dataclasses.dataclass(frozen=True)
class Try:
    """Final held-out loss of each seed; None, as mean and deviation, if it diverged."""

    learning_rate: float
    matrix_scale: float
    mean: float | None
    deviation: float | None
    losses: list[float | None]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Try":
        """The outcome of trials that differ in their seed."""
        trial, losses = records[0].trial, [finite(each.final_loss) for each in records]
        mean = None if None in losses else statistics.fmean(losses)
        several = mean is not None and len(losses) > 1
        deviation = statistics.stdev(losses) if several else None
        rates = (trial.optimizer.learning_rate, trial.matrix_scale)
        return cls(*rates, mean, deviation, losses)

    @property
    def order(self) -> float:
        """The mean, infinite if it diverged."""
        return math.inf if self.mean is None else self.mean

    @property
    def text(self) -> str:
        """The mean loss with its deviation, or how many seeds diverged."""
        if self.mean is None:
            return f"diverged ({self.losses.count(None)} of {len(self.losses)})"
        spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{spread}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Results of one variant, as in results.json, which has all but the curve."""

    optimizer: str  # the variant's label
    settings: dict[str, Any]  # all settings of the best
    seconds: float | None  # of all steps; None if every trial diverged
    step_seconds: dict[str, float]  # median of each kind of step in its fastest trial
    state_bytes: int  # the optimizer's
    best: Try  # the chosen one, over all seeds
    at_edge: tuple[str, ...]  # rates that are the least or the largest of those tried
    tries: list[Try]  # every choice of rates, over the seeds on which they are searched
    curve: list[tuple[int, float, list[float]]]  # step, seconds, losses of the best

    @classmethod
    def of(
        cls,
        label: str,
        tries: Iterable[Sequence[Record]],
        best: Sequence[Record],
        steps: int,
    ) -> "Entry":
        """Summarises a variant: all tries, and the chosen one on all seeds."""
        records = [*itertools.chain(*tries, best)]
        # Only other work of the machine makes steps slower, not rates and seeds.
        step_seconds = {
            kind: min(each.step_seconds.get(kind, math.inf) for each in records)
            for kind in dict.fromkeys(kind for r in records for kind in r.step_seconds)
        }
        optimizer = best[0].trial.optimizer
        # A kind that no trial reached lasts forever.
        each = (step_seconds.get(x, math.inf) for x in step_kinds(optimizer, steps))
        seconds = [0.0, *itertools.accumulate(each)]
        chosen, outcomes = Try.of(best), [Try.of(each) for each in tries]
        tried = {rate: {getattr(each, rate) for each in outcomes} for rate in RATES}
        curves = [dict(record.evaluations) for record in best]
        common = sorted(set.intersection(*map(set, curves)))
        points = [(k, seconds[k], [curve[k] for curve in curves]) for k in common]
        return cls(
            label,
            dataclasses.asdict(resolved(optimizer)),
            None if all(record.diverged for record in records) else seconds[-1],
            step_seconds,
            best[0].state_bytes,
            chosen,
            tuple(
                rate
                for rate, values in tried.items()
                if len(values) > 1
                and getattr(chosen, rate) in (min(values), max(values))
            ),
            outcomes,
            [point for point in points if None not in point[-1]],
        )

    def rate(self, name: str) -> str:
        """One of the best's rates, with a mark if it is at the edge of those tried."""
        return f"{getattr(self.best, name):g}{'*' * (name in self.at_edge)}"


def choose(tries: Iterable[Sequence[Record]]) -> Sequence[Record]:
    """The least mean loss, among the tries with the most seeds."""
    return min(tries, key=lambda records: (-len(records), Try.of(records).order))
