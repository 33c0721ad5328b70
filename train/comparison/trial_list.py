"""Trials of a comparison, and their records by variant."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from train.comparison.best_tries import Entry, Try
from train.comparison.comparison_config import CompareConfig
from train.comparison.trial_records import Record
from train.comparison.variants import (
    Sweep,
    Trial,
    Variant,
    all_variants,
    parse_sweep,
    parse_variant,
)
from train.config.optimizer_config import OptimizerConfig, schedule_phases


class Plan(NamedTuple):
    """Variants and trials of a comparison.

    Attributes:
      variants: the methods.
      sweeps: the settings that are swept.
      trials: what is known to be run from the start: the search of rates.
      most_later: trials that follow at the best rates, at most.
    """

    variants: list[Variant]
    sweeps: list[Sweep]
    trials: list[Trial]
    most_later: int


def make_plan(config: CompareConfig) -> Plan:
    """All trials of the search, each once, in the order in which they are run.

    Methods take turns, and a seed is finished before the next one begins: what
    slows the machine down for a while slows all of them, and a comparison that is
    stopped has something to show for each.

    Raises:
      ValueError: a variant or a sweep cannot be parsed.
    """
    base = OptimizerConfig(
        **{
            field.name: getattr(config.settings, field.name)
            for field in dataclasses.fields(OptimizerConfig)
        }
    )
    variants = [parse_variant(text, base) for text in config.optimizers]
    sweeps = [parse_sweep(text, variants) for text in config.sweep]
    searches = [
        variant.search(config.learning_rates, config.matrix_scales)
        for variant in all_variants(variants, sweeps)
    ]
    for search in searches:
        for optimizer in search:
            schedule_phases(optimizer, config.task.steps)  # raises if it does not fit
    turns = range(max(map(len, searches)))
    trials = [
        Trial(search[turn], seed)
        for seed in config.searched_seeds
        for turn in turns
        for search in searches
        if turn < len(search)
    ]
    most_later = len(set(map(tuple, searches))) * len(config.later_seeds)
    return Plan(variants, sweeps, list(dict.fromkeys(trials)), most_later)


class Phase(NamedTuple):
    """Trials that are known at the same time, and how they are spoken of.

    Attributes:
      trials: the trials.
      words: what they are.
      more: what follows them.
    """

    trials: list[Trial]
    words: str = "trials"
    more: str = ""


def phases(
    config: CompareConfig, plan: Plan, finished: Mapping[Trial, Record]
) -> Iterator[Phase]:
    """What is run one after the other: the second as the first in `finished` says."""
    if not config.later_seeds:
        yield Phase(plan.trials)
        return
    more = f"; then at most {plan.most_later} at the best rates"
    yield Phase(plan.trials, "trials to search rates", more)
    following = later_trials(config, plan, finished)
    if following:
        yield Phase(following, "trials at the best rates")


def later_trials(
    config: CompareConfig, plan: Plan, finished: Mapping[Trial, Record]
) -> list[Trial]:
    """What follows the search: each variant at its best rates, on the other seeds.

    Nothing is known of it before the search has finished, and nothing follows for a
    variant that diverged at all rates, on one of the searched seeds at least.
    """
    if any(trial not in finished for trial in plan.trials):
        return []
    variants = all_variants(plan.variants, plan.sweeps)
    chosen = [
        entry.chosen
        for entry in make_entries(config, variants, finished, config.searched_seeds)
    ]
    best = dict.fromkeys(each.optimizer for each in chosen if math.isfinite(each.mean))
    return [Trial(optimizer, seed) for seed in config.later_seeds for optimizer in best]


def make_entries(
    config: CompareConfig,
    variants: Iterable[Variant],
    finished: Mapping[Trial, Record],
    seeds: Sequence[int],
    later: Sequence[Record] = (),
) -> list[Entry]:
    """What has finished of each variant; those of which nothing has are left out.

    Args:
      config: whose rates were searched.
      variants: the variants, of which each is in the result once.
      finished: records of trials.
      seeds: on which rates were searched, as far as they shall count.
      later: records of the other seeds.
    """
    entries = []
    for variant in dict.fromkeys(variants):
        tries = []
        for optimizer in variant.search(config.learning_rates, config.matrix_scales):
            trials = [Trial(optimizer, seed) for seed in seeds]
            kept = tuple(finished[trial] for trial in trials if trial in finished)
            if kept:
                tries.append(Try(optimizer, kept))
        if tries:
            entries.append(Entry(variant, tuple(tries), tuple(later)))
    return entries
