"""All tries of each method of a comparison, and the best of them."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable

from train.comparison.trial_records import Record, elapsed_seconds
from train.comparison.variants import Variant
from train.config.optimizer_config import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Try:
    """One choice of learning rate and factor on matrices, over the seeds there are."""

    optimizer: OptimizerConfig
    records: tuple[Record, ...]

    @property
    def learning_rate(self) -> float:
        """The one that was chosen."""
        return self.optimizer.learning_rate

    @property
    def matrix_scale(self) -> float:
        """The factor on matrices that was chosen, under whichever name it is known."""
        return self.records[0].trial.matrix_scale

    @functools.cached_property
    def losses(self) -> list[float]:
        """Final held-out loss of each seed, infinite where it diverged."""
        return [record.final_loss for record in self.records]

    @property
    def mean(self) -> float:
        """Mean of the losses; infinite if any is."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two or an infinite one."""
        if len(self.losses) < 2 or math.isinf(self.mean):
            return None
        return statistics.stdev(self.losses)

    @property
    def text(self) -> str:
        """The mean loss with its deviation, or how many seeds diverged."""
        if lost := sum(map(math.isinf, self.losses)):
            return f"diverged ({lost} of {len(self.losses)})"
        return f"{self.mean:.3f}" + (
            "" if self.deviation is None else f" ± {self.deviation:.3f}"
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """All that was tried of one variant; at least one trial has finished.

    Attributes:
      variant: the variant.
      tries: over the seeds on which rates are searched.
      later: records of the other seeds, of which those at the best rates count.
    """

    variant: Variant
    tries: tuple[Try, ...]
    later: tuple[Record, ...] = ()

    @functools.cached_property
    def chosen(self) -> Try:
        """The least mean loss, of those tries that have the most seeds."""
        seeds = max(len(each.records) for each in self.tries)
        return min(
            (each for each in self.tries if len(each.records) == seeds),
            key=lambda each: each.mean,
        )

    @functools.cached_property
    def best(self) -> Try:
        """The chosen try, over all seeds there are."""
        chosen = self.chosen.optimizer
        later = (each for each in self.later if each.trial.optimizer == chosen)
        return Try(chosen, (*self.chosen.records, *later))

    @functools.cached_property
    def at_edge(self) -> tuple[str, ...]:
        """Which rates of the best are the least or the largest of several tried."""
        return tuple(
            rate
            for rate in ("learning_rate", "matrix_scale")
            if len(tried := {getattr(each, rate) for each in self.tries}) > 1
            and getattr(self.chosen, rate) in (min(tried), max(tried))
        )

    @functools.cached_property
    def step_seconds(self) -> dict[str, float]:
        """Median seconds of each kind of step, in the trial that was disturbed least.

        Rates and seeds cost no time; whatever else a machine does, does.
        """
        kinds = {kind for record in self._records for kind in record.step_seconds}
        return {
            kind: min(
                record.step_seconds[kind]
                for record in self._records
                if kind in record.step_seconds
            )
            for kind in kinds
        }

    def seconds(self, step: int) -> float:
        """Seconds of so many steps; see `elapsed_seconds`."""
        return elapsed_seconds(self.variant.optimizer, self.step_seconds, step)

    @property
    def ran_fully(self) -> bool:
        """Whether there are times of all kinds of steps."""
        return any(not record.diverged for record in self._records)

    @property
    def _records(self) -> list[Record]:
        return [record for each in (*self.tries, self.best) for record in each.records]


def by_loss(entries: Iterable[Entry]) -> list[Entry]:
    """Sorted by final loss; those that diverged come last."""
    return sorted(entries, key=lambda entry: entry.best.mean)
