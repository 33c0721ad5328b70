"""Search over rates and seeds: which trials there are, and in which order."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from train.comparison.comparison_config import CompareConfig
from train.comparison.outcomes import Entry, Try, choose
from train.comparison.trial_records import Record, Trial
from train.comparison.variants import Variant, parse_sweep, parse_variant
from train.config.optimizer_config import OptimizerConfig, schedule_phases
from train.step.optimizers import check_rank

Finished = Mapping[Trial, Record]


class Search:
    """Variants, sweeps and trials of a comparison.

    `trials` are all on the searched seeds, each once, in the order to run them: methods
    alternate, and a seed is finished before the next one begins. Whatever slows the
    machine down for a while thus slows all methods, and a comparison that is stopped
    has results for each.

    Raises:
      ValueError: a variant or a sweep cannot be parsed, its schedule has more steps
        than the task, or its rank is too large for the model.
    """

    def __init__(self, config: CompareConfig):
        self.config, task = config, config.task
        base = OptimizerConfig(**dataclasses.asdict(config.settings))
        rates = (config.learning_rates, config.matrix_scales)
        self.variants = [parse_variant(x, base, *rates) for x in config.optimizers]
        self.sweeps = [parse_sweep(text, self.variants) for text in config.sweep]
        swept = (form for sweep in self.sweeps for row in sweep.rows for form in row)
        self._all = list(dict.fromkeys([*self.variants, *swept]))
        tuning = config.tuning_seeds or len(config.seeds)
        self.seeds, self.later_seeds = config.seeds[:tuning], config.seeds[tuning:]
        turns = itertools.zip_longest(*(each.searched for each in self._all))
        optimizers = dict.fromkeys(filter(None, itertools.chain(*turns)))
        for optimizer in optimizers:
            schedule_phases(optimizer, task.steps)
            check_rank(optimizer, task.model)
        self.trials = [Trial(each, seed) for seed in self.seeds for each in optimizers]

    def phases(self, finished: Finished) -> Iterator[tuple[list[Trial], str, str]]:
        """Yields groups of trials to run: trials, name, note on what follows.

        First the search of rates, then the best rates by what is then in `finished`.
        """
        if not self.later_seeds:
            yield self.trials, "trials", ""
            return
        searches = {tuple(variant.searched) for variant in self._all}
        most = len(searches) * len(self.later_seeds)  # fewer if a variant diverges
        more = f"; then at most {most} at the best rates"
        yield self.trials, "trials to search rates", more
        if later := self.later_trials(finished):
            yield later, "trials at the best rates", ""

    def later_trials(self, finished: Finished) -> list[Trial]:
        """Each variant at its best rates on the other seeds, once rates are searched.

        Empty before all of `trials` have finished. Variants that diverged at all rates,
        on one of the searched seeds at least, are left out.
        """
        if not finished.keys() >= set(self.trials):
            return []
        chosen = [choose(self._tries(variant, finished)) for variant in self._all]
        lasting = [each for each in chosen if Try.of(each).mean is not None]
        best = dict.fromkeys(records[0].trial.optimizer for records in lasting)
        return [Trial(each, seed) for seed in self.later_seeds for each in best]

    def counted(self, finished: Finished) -> Finished:
        """The finished trials of those seeds that lack none.

        Seeds that lack some trials count if no searched seed is complete.
        """
        wanted = [*self.trials, *self.later_trials(finished)]
        lacking = {trial.seed for trial in wanted if trial not in finished}
        left_out = lacking if set(self.seeds) - lacking else ()
        known = (trial for trial in wanted if trial in finished)
        return {trial: finished[trial] for trial in known if trial.seed not in left_out}

    def entries(self, counted: Finished) -> dict[Variant, Entry]:
        """Results of variants by loss, divergence last; none without a trial."""
        entries, steps = {}, self.config.task.steps
        for variant in self._all:
            if tries := self._tries(variant, counted):
                chosen = choose(tries)[0].trial.optimizer
                best = [r for trial, r in counted.items() if trial.optimizer == chosen]
                entries[variant] = Entry.of(variant.label, tries, best, steps)
        return dict(sorted(entries.items(), key=lambda item: item[1].best.order))

    def _tries(self, variant: Variant, finished: Finished) -> list[list[Record]]:
        """Records on the searched seeds, for each of the variant's rates."""
        trials = [[Trial(x, seed) for seed in self.seeds] for x in variant.searched]
        tries = ([finished[t] for t in each if t in finished] for each in trials)
        return list(filter(None, tries))
