"""Search over rates and seeds: which trials there are, and the best of each variant."""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.comparison.comparison_config import CompareConfig
from train.comparison.trial_records import Record, elapsed_seconds, finite
from train.comparison.variants import Trial, Variant, parse_sweep, parse_variant
from train.config.methods import resolved
from train.config.optimizer_config import OptimizerConfig, schedule_phases

Finished = Mapping[Trial, Record]
Tries = Mapping[OptimizerConfig, Sequence[Record]]  # of each seed


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
        trial = records[0].trial
        losses = [finite(record.final_loss) for record in records]
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
        if lost := self.losses.count(None):
            return f"diverged ({lost} of {len(self.losses)})"
        spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{spread}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Results of one variant, as in results.json, which has all but the curve.

    Attributes:
      optimizer: the variant's label.
      settings: all settings of the best.
      seconds: of all steps; None if every trial diverged.
      step_seconds: median seconds of each kind of step, in its fastest trial.
      state_bytes: the optimizer's.
      best: the chosen try, over all seeds.
      at_edge: which of its rates are the least or the largest of several tried.
      tries: every choice of rates, over the seeds on which they are searched.
      curve: step, seconds and the losses of all seeds of the best.
    """

    optimizer: str
    settings: dict[str, Any]
    seconds: float | None
    step_seconds: dict[str, float]
    state_bytes: int
    best: Try
    at_edge: tuple[str, ...]
    tries: list[Try]
    curve: list[tuple[int, float, list[float]]]

    @classmethod
    def of(cls, label: str, tries: Tries, best: Sequence[Record], steps: int):
        """Summarises a variant: all tries, and the chosen one on all seeds."""
        records = [record for each in (*tries.values(), best) for record in each]
        step_seconds: dict[str, float] = {}
        # Only other work of the machine makes steps slower, not rates and seeds.
        for kind, value in (pair for r in records for pair in r.step_seconds.items()):
            step_seconds[kind] = min(value, step_seconds.get(kind, math.inf))
        optimizer = best[0].trial.optimizer
        seconds = functools.partial(elapsed_seconds, optimizer, step_seconds)
        chosen, outcomes = Try.of(best), [Try.of(each) for each in tries.values()]
        at_edge = []
        for rate in ("learning_rate", "matrix_scale"):
            tried = {getattr(each, rate) for each in outcomes}
            if len(tried) > 1 and getattr(chosen, rate) in (min(tried), max(tried)):
                at_edge.append(rate)
        curves = [dict(record.evaluations) for record in best]
        common = sorted(set.intersection(*map(set, curves)))
        losses = {step: [curve[step] for curve in curves] for step in common}
        return cls(
            label,
            dataclasses.asdict(resolved(optimizer)),
            None if all(record.diverged for record in records) else seconds(steps),
            step_seconds,
            best[0].state_bytes,
            chosen,
            tuple(at_edge),
            outcomes,
            [(k, seconds(k), each) for k, each in losses.items() if None not in each],
        )


def choose(tries: Tries) -> OptimizerConfig:
    """The least mean loss, among the tries with the most seeds."""

    def order(optimizer: OptimizerConfig) -> tuple[int, float]:
        losses = [record.final_loss for record in tries[optimizer]]
        return -len(losses), statistics.fmean(losses)

    return min(tries, key=order)


class Search:
    """Variants, sweeps and trials of a comparison.

    `trials` are all on the searched seeds, each once, in the order to run them: methods
    alternate, and a seed is finished before the next one begins. Whatever slows the
    machine down for a while thus slows all methods, and a comparison that is stopped
    has results for each.

    Raises:
      ValueError: a variant or a sweep cannot be parsed, or its schedule has more
        steps than the task.
    """

    def __init__(self, config: CompareConfig):
        self.config = config
        base = OptimizerConfig(**dataclasses.asdict(config.settings))
        self.variants = [parse_variant(text, base) for text in config.optimizers]
        self.sweeps = [parse_sweep(text, self.variants) for text in config.sweep]
        swept = [form for s in self.sweeps for row in s.rows.values() for form in row]
        rates = (config.learning_rates, config.matrix_scales)
        self._tried = {each: each.search(*rates) for each in (*self.variants, *swept)}
        trials = (
            Trial(optimizer, seed)
            for seed in config.searched_seeds
            for turn in itertools.zip_longest(*self._tried.values())
            for optimizer in filter(None, turn)
        )
        self.trials = list(dict.fromkeys(trials))
        for trial in self.trials:
            schedule_phases(trial.optimizer, config.task.steps)

    @property
    def most_later_trials(self) -> int:
        """Number of `later_trials` if no variant diverges."""
        return len(set(map(tuple, self._tried.values()))) * len(self.config.later_seeds)

    def later_trials(self, finished: Finished) -> list[Trial]:
        """Each variant at its best rates on the other seeds, once rates are searched.

        Empty before all of `trials` have finished. Variants that diverged at all rates,
        on one of the searched seeds at least, are left out.
        """
        if any(trial not in finished for trial in self.trials):
            return []
        best: dict[OptimizerConfig, None] = {}
        for variant in self._tried:
            tries = self._tries(variant, finished, self.config.searched_seeds)
            chosen = choose(tries)
            if all(math.isfinite(record.final_loss) for record in tries[chosen]):
                best[chosen] = None
        return [Trial(each, seed) for seed in self.config.later_seeds for each in best]

    def entries(
        self,
        variants: Iterable[Variant],
        finished: Finished,
        seeds: Sequence[int],
        later: Sequence[Trial] = (),
    ) -> list[Entry]:
        """Results of variants by loss, divergence last; none without a finished trial.

        Args:
          variants: the variants, of which each is in the result once.
          finished: records of trials.
          seeds: on which rates were searched, as far as they shall count.
          later: trials on the other seeds, which count for the best rates.
        """
        entries = []
        for variant in dict.fromkeys(variants):
            if tries := self._tries(variant, finished, seeds):
                chosen = choose(tries)
                more = [finished[each] for each in later if each.optimizer == chosen]
                best = [*tries[chosen], *more]
                steps = self.config.task.steps
                entries.append(Entry.of(variant.label, tries, best, steps))
        return sorted(entries, key=lambda entry: entry.best.order)

    def _tries(
        self, variant: Variant, finished: Finished, seeds: Sequence[int]
    ) -> dict[OptimizerConfig, list[Record]]:
        found: dict[OptimizerConfig, list[Record]] = {}
        for optimizer, seed in itertools.product(self._tried[variant], seeds):
            if record := finished.get(Trial(optimizer, seed)):
                found.setdefault(optimizer, []).append(record)
        return found
