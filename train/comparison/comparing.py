"""Runs or resumes the trials of a comparison, and writes its report."""

import contextlib
from collections.abc import Sequence

import tqdm

from train.comparison import comparison_report
from train.comparison import trial_records as records
from train.comparison.comparison_config import CompareConfig
from train.comparison.search import Search
from train.comparison.trial_records import Record, Trial
from train.comparison.trial_training import Runner
from train.config.pretrain_config import TextTask
from train.config.rules import flag
from train.data import dataset as data
from train.rundir import changes, identity
from train.rundir.directory import OWN_FILES, check_owned, lock_directory
from train.rundir.saved_config import load_config, save_config
from train.system import compilation_cache, console
from train.system.interruption import Interruption

TASK_FILE = "task.json"
TRIALS = "trials"


def run(config: CompareConfig, command: str) -> int:
    """Runs what has not finished yet and reports; returns the exit code.

    `command` is the command line, which is told to go on with it.
    """
    compilation_cache.use(config.start)
    directory, runner, interruption = config.output_dir / TRIALS, None, None
    # A ValueError of a trial is a bug and shows a traceback.
    with console.user_errors(OSError), contextlib.ExitStack() as stack:
        with console.user_errors(ValueError):
            search = Search(config)
            own = (TRIALS, "table.md", "results.json", "loss.png", *OWN_FILES)
            check_owned(config.output_dir, TASK_FILE, own)
            stack.enter_context(lock_directory(config.output_dir))
            finished = records.load(directory)
            has_trials = bool(finished)
            _check_task(config, has_trials)
            directory.mkdir(exist_ok=True)
        for trials, name, more in search.phases(finished):
            missing = [trial for trial in trials if trial not in finished]
            if missing and runner is None:
                with console.user_errors(ValueError):
                    text = _open_text(config, has_trials)
                runner = Runner(config.task, text, command)
            done = len(trials) - len(missing)
            print(f"{len(trials)} {name}, {done} of them finished before{more}")
            if missing:
                interruption = _run_trials(missing, runner, config, finished)
                if interruption.received:
                    break
        tables = comparison_report.write(search, search.counted(finished))
        wanted = (trial for group, *_ in search.phases(finished) for trial in group)
        if all(trial in finished for trial in wanted):
            print(f"\n{tables}\nTables, plot and numbers are in {config.output_dir}")
            return 0
        done = sum(trial in finished for trial in trials)
        print(
            f"Stopped by {interruption.received.name}: {done} of {len(trials)} {name} "
            f"are finished. To go on: {command}"
        )
        return interruption.exit_code


def _run_trials(
    trials: Sequence[Trial],
    runner: Runner,
    config: CompareConfig,
    finished: dict[Trial, Record],
) -> Interruption:
    """Runs trials to the end or to an interruption; saves each, also in `finished`."""
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
            finished[trial] = record
            bar.update(done * steps - bar.n)  # a diverged trial ended early
    return interruption


def _check_task(config: CompareConfig, has_trials: bool) -> None:
    """Raises a ValueError if the directory has trials of another task."""
    directory, saved = config.output_dir, config.output_dir / TASK_FILE
    if not saved.exists():
        return
    changed = changes.find(config.task, load_config(TextTask, saved))
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


def _open_text(config: CompareConfig, has_trials: bool) -> data.Text:
    """Opens the text of all trials, and saves the task in the directory."""
    directory, task = config.output_dir, config.task
    text = data.open_text(
        task.data,
        task.model.vocabulary_size,
        seed=config.seeds[0],
        tokenizer_directory=directory if has_trials else None,
        report=console.warn,
    )
    # The task comes first: with it the other files are known to be this program's.
    save_config(task, directory / TASK_FILE)
    text.tokenizer.save(directory)
    identity.save(task.data, directory)
    print(text.description, flush=True)
    return text
