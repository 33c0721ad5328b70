"""What a comparison consists of: its configuration, and the trials that makes."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import tyro

from train.config import PresetName
from train.entries import Entry, Try
from train.optimizer_config import OptimizerConfig, OptimizerName, schedule_phases
from train.records import Record
from train.rules import fits_32_bits
from train.trials import Task
from train.variants import (
    Sweep,
    Trial,
    Variant,
    all_variants,
    parse_sweep,
    parse_variant,
)


@dataclasses.dataclass(frozen=True)
class Settings(OptimizerConfig):
    """Settings of all methods that do not name their own.

    Those that are searched, or are another argument, cannot be given.
    """

    name: Annotated[OptimizerName, tyro.conf.Suppress] = "subtrack"
    learning_rate: Annotated[float, tyro.conf.Suppress] = 1e-3
    scale: Annotated[float | None, tyro.conf.Suppress] = None
    matrix_learning_rate_scale: Annotated[float, tyro.conf.Suppress] = 1.0


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Trains the same model on the same batches with one optimizer after the other.

    Every method is tried with the same learning rates, times the same factors on the
    updates of attention and MLP matrices, times the same seeds; a table has each at
    the rates of its least mean loss. Finished trials are kept: the same command, or
    one that asks for more, goes on where the last one stopped. The values below are
    those of the chosen preset.

    Attributes:
      task: what all trials share.
      preset: where all other values come from unless given, as for train.pretrain.
      optimizers: the methods, each with settings of its own if need be, which are then
        not searched: adamw:b2=0.95 subtrack:update_interval=50,scale=0.5. static is
        subtrack without tracking: what it loses, tracking wins.
      learning_rates: peak learning rates to try.
      matrix_scales: factors on the updates of matrices to try: scale of the low-rank
        methods with subspaces, matrix_learning_rate_scale of the others.
      seeds: each decides initial parameters, order of the data and random subspaces,
        alike for all methods.
      sweep: settings and values to try one by one, all else being equal, each with a
        table of its own: rank=16,32,64 transport=on,off. Methods without the setting
        are shown as they are.
      tuning_seeds: rates are searched on the first so many of the seeds, and the
        other seeds are run at the best rates of these alone; None searches on all.
      output_dir: directory of the comparison: table.md, loss.png, results.json, and a
        record of each trial.
      settings: of all methods, unless they name their own.
    """

    task: Task
    preset: PresetName = "tiny"
    optimizers: tuple[str, ...] = ("adamw", "muon", "galore", "static", "subtrack")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    matrix_scales: tuple[float, ...] = (0.25, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: tuple[str, ...] = ()
    tuning_seeds: int | None = None
    output_dir: pathlib.Path = pathlib.Path("runs/compare")
    settings: Settings = Settings()

    def __post_init__(self):
        lists = ("optimizers", "learning_rates", "matrix_scales", "seeds")
        for name in (*lists, "sweep"):
            values, flag = getattr(self, name), "--" + name.replace("_", "-")
            if name in lists and not values:
                raise ValueError(f"{flag} must have at least one value")
            if len(set(values)) < len(values):
                shown = " ".join(map(str, values))
                raise ValueError(f"{flag} has a value twice: {shown}")
        for name in ("learning_rates", "matrix_scales"):
            for value in getattr(self, name):
                if not 0 < value < float("inf"):
                    flag = "--" + name.replace("_", "-")
                    raise ValueError(f"{flag} must be positive and finite, got {value}")
        for seed in self.seeds:
            if not fits_32_bits.holds(seed):
                raise ValueError(f"--seeds must be {fits_32_bits.words}, got {seed}")
        if self.tuning_seeds is not None:
            most = len(self.seeds)
            if not 1 <= self.tuning_seeds <= most:
                raise ValueError(
                    "--tuning-seeds must be at least 1 and at most the number of "
                    f"--seeds, {most}, got {self.tuning_seeds}"
                )

    @property
    def searched_seeds(self) -> tuple[int, ...]:
        """On which all rates are tried."""
        return self.seeds[: self.tuning_seeds]

    @property
    def later_seeds(self) -> tuple[int, ...]:
        """On which the best rates alone are tried."""
        return self.seeds[len(self.searched_seeds) :]


class Plan(NamedTuple):
    """What a comparison consists of.

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
      ValueError: a variant or a sweep is none.
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
