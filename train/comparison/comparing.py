"""Runs or resumes the trials of a comparison, and writes its report."""

import contextlib
from collections.abc import Iterator, Sequence

import tqdm

from train.comparison import comparison_report
from train.comparison import trial_records as records
from train.comparison.comparison_config import CompareConfig
from train.comparison.search import Finished, Search
from train.comparison.trial_training import Runner
from train.comparison.variants import Trial
from train.config.pretrain_config import TextTask
from train.config.rules import flag
from train.data import dataset as data
from train.rundir import changes, identity
from train.rundir.directory import OWN_FILES, check_owned, lock_directory
from train.rundir.saved_config import load_config, save_config
from train.step import optimizers
from train.system import compilation_cache, console
from train.system.interruption import Interruption

TASK_FILE = "task.json"
TRIALS = "trials"


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
            search = Search(config)
            for trial in search.trials:
                optimizers.check_rank(trial.optimizer, config.task.model)
            own = (TRIALS, "table.md", "results.json", "loss.png", *OWN_FILES)
            check_owned(config.output_dir, TASK_FILE, own)
            stack.enter_context(lock_directory(config.output_dir))
            has_trials = _check_task(config)
            directory.mkdir(exist_ok=True)
        for trials, words, more in _phases(search, finished):
            with console.user_errors(ValueError, OSError):
                finished |= records.load_finished(trials, directory)
                missing = [trial for trial in trials if trial not in finished]
                if missing and runner is None:
                    text = _open_text(config, has_trials)
            before = len(trials) - len(missing)
            print(f"{len(trials)} {words}, {before} of them finished before{more}")
            if not missing:
                continue
            with console.user_errors(OSError):
                if runner is None:
                    print(text.description, flush=True)
                    runner = Runner(config.task, text, command)
                interruption = _run_trials(missing, runner, config)
                finished |= records.load_finished(missing, directory)
            if interruption.received:
                break
        with console.user_errors(OSError):
            tables = comparison_report.write(search, finished) if finished else ""
    wanted = (*search.trials, *search.later_trials(finished))
    if all(trial in finished for trial in wanted):
        print(f"\n{tables}\nTables, plot and numbers are in {config.output_dir}")
        return 0
    done = sum(trial in finished for trial in trials)
    print(
        f"Stopped by {interruption.received.name}: {done} of {len(trials)} {words} are "
        f"finished. To go on: {command}"
    )
    return interruption.exit_code


def _phases(
    search: Search, finished: Finished
) -> Iterator[tuple[list[Trial], str, str]]:
    """Yields groups of trials to run: trials, name, note on what follows.

    First the search of rates, then the best rates by what is then in `finished`.
    """
    if not search.config.later_seeds:
        yield search.trials, "trials", ""
        return
    more = f"; then at most {search.most_later_trials} at the best rates"
    yield search.trials, "trials to search rates", more
    if later := search.later_trials(finished):
        yield later, "trials at the best rates", ""


def _run_trials(
    trials: Sequence[Trial], runner: Runner, config: CompareConfig
) -> Interruption:
    """Runs trials and saves each, up to the end or to an interruption."""
    steps, stopping = config.task.steps, "stopping after this step, finished trials"
    with (
        tqdm.tqdm(total=len(trials) * steps, unit="step", dynamic_ncols=True) as bar,
        Interruption(f"{stopping} are kept") as interruption,
    ):

        def after_step(loss: float) -> bool:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            return interruption.received is None

        for done, trial in enumerate(trials, start=1):
            name, rate = trial.optimizer.name, trial.optimizer.learning_rate
            bar.set_description(f"{name} {rate:g} seed {trial.seed}")
            record = runner.run(trial, after_step)
            if record is None:
                break
            records.save(record, config.output_dir / TRIALS)
            bar.update(done * steps - bar.n)  # a diverged trial ended early
    return interruption


def _check_task(config: CompareConfig) -> bool:
    """Whether the directory has trials; raises a ValueError if their task differs."""
    directory = config.output_dir
    saved = directory / TASK_FILE
    if not saved.exists():
        return False
    changed = changes.find(config.task, load_config(TextTask, saved))
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


def _open_text(config: CompareConfig, has_trials: bool) -> data.Text:
    """Opens the text of all trials, and saves the task in the directory."""
    text = data.open_text(
        config.task.data,
        config.task.model.vocabulary_size,
        seed=config.seeds[0],
        tokenizer_directory=config.output_dir if has_trials else None,
        report=console.warn,
    )
    # The task comes first: with it the other files are known to be this program's.
    save_config(config.task, config.output_dir / TASK_FILE)
    text.tokenizer.save(config.output_dir)
    identity.save(config.task.data, config.output_dir)
    return text
