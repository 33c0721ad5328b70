"""Runs the trials of a comparison and writes its report."""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import tqdm

from train.comparison import comparison_report
from train.comparison import trial_records as records
from train.comparison.best_tries import Entry
from train.comparison.comparison_config import CompareConfig, Task
from train.comparison.trial_list import (
    Plan,
    later_trials,
    make_entries,
    make_plan,
    phases,
)
from train.comparison.trial_records import Record
from train.comparison.trial_training import Runner
from train.comparison.variants import Trial, Variant, all_variants
from train.config.rules import flag
from train.data import dataset as data
from train.rundir import changes, identity
from train.rundir.directory import (
    OWN_FILES,
    check_owned,
    load_config,
    lock_directory,
    save_config,
)
from train.step import optimizers
from train.system import compilation_cache, console
from train.system.files import write_figure, write_whole
from train.system.interruption import Interruption

TASK_FILE = "task.json"
TRIALS = "trials"


def run_trials(
    trials: Sequence[Trial], runner: Runner, directory: pathlib.Path, steps: int
) -> Interruption:
    """Runs trials and saves each, up to the end or to an interruption."""
    with (
        tqdm.tqdm(total=len(trials) * steps, unit="step", dynamic_ncols=True) as bar,
        Interruption(
            "stopping after this step, finished trials are kept"
        ) as interruption,
    ):

        def after_step(loss: float) -> bool:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            return interruption.received is None

        for done, trial in enumerate(trials, start=1):
            optimizer = trial.optimizer
            bar.set_description(
                f"{optimizer.name} {optimizer.learning_rate:g} seed {trial.seed}"
            )
            record = runner.run(trial, after_step)
            if record is None:
                break
            records.save(record, directory)
            bar.update(done * steps - bar.n)  # of a diverged trial, what it left out
    return interruption


def write_report(
    config: CompareConfig, plan: Plan, finished: Mapping[Trial, Record]
) -> str:
    """Writes tables, plot and numbers of what has finished; returns the tables.

    Seeds that some trials still lack are left out, unless there is no other on which
    rates are searched.
    """
    later = later_trials(config, plan, finished)
    lacking = {trial.seed for trial in (*plan.trials, *later) if trial not in finished}
    whole = [seed for seed in config.searched_seeds if seed not in lacking]
    seeds = whole or config.searched_seeds
    kept = [finished[trial] for trial in later if trial.seed not in lacking]

    def entries(variants: Sequence[Variant]) -> list[Entry]:
        return make_entries(config, variants, finished, seeds, kept)

    main, steps = entries(plan.variants), config.task.steps
    tables, swept = [], {}
    for sweep in plan.sweeps:
        variants = list(all_variants(plan.variants, [sweep]))
        tables += [
            f"## {sweep.name}",
            comparison_report.sweep_table(sweep, plan.variants, entries(variants)),
        ]
        swept[sweep.name] = entries(variants[len(plan.variants) :])
    tuning_seeds = seeds if config.later_seeds else ()
    first = next(iter(finished.values()))
    title = _title(config, first)
    parts = [
        f"# {title}",
        comparison_report.results_table(main, steps),
        comparison_report.notes(
            main, [entry for found in swept.values() for entry in found], tuning_seeds
        ),
        "## All that was tried",
        comparison_report.grid_table(main),
        *tables,
    ]
    text = "\n\n".join(parts) + "\n"
    results = {
        "title": title,
        "machine": first.machine,
        "versions": first.versions,
        "tuning_seeds": tuning_seeds,
        "optimizers": comparison_report.aggregate(main, steps),
        "sweeps": {
            name: comparison_report.aggregate(found, steps)
            for name, found in swept.items()
        },
    }
    directory = config.output_dir
    write_whole(directory / "table.md", text)
    write_whole(directory / "results.json", json.dumps(results, indent=2) + "\n")
    write_figure(directory / "loss.png", comparison_report.plot(main, title))
    return text


def _title(config: CompareConfig, record: Record) -> str:
    task = config.task
    return (
        f"{config.preset}, {record.parameters / 1e6:.3g} M parameters: "
        f"{task.steps:,} steps of {task.data.batch_size_tokens:,} tokens on "
        f"{record.machine['device']}"
    )


def _open_directory(config: CompareConfig) -> bool:
    """Whether there are trials already; raises a ValueError if they are of others."""
    directory = config.output_dir
    saved = directory / TASK_FILE
    if not saved.exists():
        return False
    changed = changes.find(config.task, load_config(Task, saved))
    has_trials = any((directory / TRIALS).glob("*.json"))
    same, other = [], {}
    if has_trials:
        identity.check_tokenizer(directory)
        same, other = identity.compare_text(config.task.data, directory)
    told = [changes.told(name, changed[name]) for name in changed if name not in same]
    told += [f"other files behind {flag(name)}: {what}" for name, what in other.items()]
    if told:
        raise ValueError(
            f"--output-dir {directory} holds another comparison: {'; '.join(told)}. "
            "Give its values to continue it, or another directory"
        )
    return has_trials


def _open_text(config: CompareConfig, is_known: bool) -> data.Text:
    """The text of all trials; the directory then says which task it is of."""
    text = data.open_text(
        config.task.data,
        config.task.model.vocabulary_size,
        seed=config.seeds[0],
        tokenizer_directory=config.output_dir if is_known else None,
        report=console.warn,
    )
    # In this order: with a task the other files are this program's own.
    save_config(config.task, config.output_dir / TASK_FILE)
    text.tokenizer.save(config.output_dir)
    identity.save(config.task.data, config.output_dir)
    return text


def run(config: CompareConfig, command: str) -> int:
    """Runs what has not finished yet and reports; returns the exit code.

    Args:
      config: the comparison.
      command: the command line, to go on with it.
    """
    compilation_cache.use(config.start)
    directory = config.output_dir / TRIALS
    finished, runner, interruption = {}, None, None
    with contextlib.ExitStack() as stack:
        with console.user_errors(ValueError, OSError):
            plan = make_plan(config)
            for trial in plan.trials:
                optimizers.check_rank(trial.optimizer, config.task.model)
            own = (TRIALS, "table.md", "results.json", "loss.png", *OWN_FILES)
            check_owned(config.output_dir, TASK_FILE, own)
            stack.enter_context(lock_directory(config.output_dir))
            is_known = _open_directory(config)
            directory.mkdir(exist_ok=True)
        for trials, words, more in phases(config, plan, finished):
            with console.user_errors(ValueError, OSError):
                finished |= records.load_finished(trials, directory)
                missing = [trial for trial in trials if trial not in finished]
                if missing and runner is None:
                    text = _open_text(config, is_known)
            before = len(trials) - len(missing)
            print(f"{len(trials)} {words}, {before} of them finished before{more}")
            if not missing:
                continue
            with console.user_errors(OSError):
                if runner is None:
                    print(text.description, flush=True)
                    runner = Runner(config.task, text, command)
                interruption = run_trials(missing, runner, directory, config.task.steps)
                finished |= records.load_finished(missing, directory)
            if interruption.received:
                break
        with console.user_errors(OSError):
            tables = write_report(config, plan, finished) if finished else ""
        following = later_trials(config, plan, finished)
        if any(trial not in finished for trial in (*plan.trials, *following)):
            done = sum(trial in finished for trial in trials)
            print(
                f"Stopped by {interruption.received.name}: {done} of {len(trials)} "
                f"{words} are finished. To go on: {command}"
            )
            return interruption.exit_code
        print(f"\n{tables}\nTables, plot and numbers are in {config.output_dir}")
        return 0
