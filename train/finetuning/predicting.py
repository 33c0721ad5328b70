"""Predictions of a fine-tuned model for the rows of a split or a file."""

import dataclasses
import pathlib
from collections.abc import Iterator

from train.config.finetune_config import FinetuneConfig
from train.config.predict_config import PredictConfig
from train.config.task_data_config import TaskDataConfig
from train.config.tasks import Task
from train.data.row_files import Table, read_rows
from train.finetuning import batches, evaluation, submission, tables
from train.finetuning.task_data import encode_table
from train.rundir import trained_model
from train.rundir.checkpoints import CheckpointError, quiet_orbax
from train.system import compilation_cache, console, files
from train.tokenization.pairs import PairTokenizer


def run(config: PredictConfig) -> None:
    """Predicts rows, writes files, and prints scores of rows with labels.

    Errors that a user can cause end the program with one line.
    """
    compilation_cache.use(config.start)
    quiet_orbax()
    with console.user_errors(ValueError, OSError, CheckpointError):
        predict(config)


def predict(config: PredictConfig) -> None:
    """Predicts the rows of a config.

    Raises:
      ValueError: rows and model do not fit, or a file exists already.
      OSError: a file cannot be read or written.
      CheckpointError: the run has no checkpoint, or a damaged one.
    """
    tuned = trained_model.load_config_of(FinetuneConfig, config.checkpoint)
    data = _data(config, tuned)
    task = data.chosen_task
    classes = _classes(task, tuned)
    splits = list(_tables(config, data, task))
    targets = [
        config.output_dir / submission.file_name(task, name) for name, *_ in splits
    ]
    for target in targets:
        if target.exists():
            raise ValueError(f"{target} exists already: give another --output-dir")
    restored = trained_model.load_params(config.checkpoint, tuned.model, config.choice)
    print(f"Model      {config.checkpoint}, step {restored.step:,}")
    tokenizer = PairTokenizer(config.checkpoint, tuned.data.max_length_tokens)
    lengths = batches.bucket_lengths(
        tuned.data.max_length_tokens, tuned.data.length_buckets
    )
    size = config.batch_size_examples
    evaluator = evaluation.Evaluator(tuned.model, lengths, size, None, slice(0, size))
    for (name, table, where), target in zip(splits, targets, strict=True):
        split = encode_table(table, task, classes, tokenizer, name, where)
        logits = evaluator.begin(restored.params, split)()
        found = evaluation.predictions(task, classes, logits)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = submission.content(task, target.name, split.indices, found)
        files.write_whole(target, content)
        print(f"Written    {len(split):,} predictions for {where} to {target}")
        if task.answers == "numbers" and task.labels:
            named = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
            print(f"Classes    {named}")
        if split.is_labelled.any():
            values = evaluation.score(task, classes, split, logits).outcome.values
            shown = ", ".join(
                f"{each.replace('_', ' ')} {value:.4f}"
                for each, value in values.items()
            )
            print(f"Scores     {shown} of {int(split.is_labelled.sum()):,} rows")


def _data(config: PredictConfig, tuned: FinetuneConfig) -> TaskDataConfig:
    """Which rows to read: as in the run, with what is given instead."""
    given = {
        name: getattr(config, name)
        for name in ("dataset", "dataset_config", "dataset_revision")
        if getattr(config, name) is not None
    }
    fields = {
        name: getattr(config, name)
        for name in ("text_field", "pair_field")
        if getattr(config, name) is not None
    }
    is_other = config.task not in (None, tuned.data.task)
    base = TaskDataConfig(task=config.task) if is_other else tuned.data
    if is_other and not given and tuned.data.dataset is not None:
        given = {"dataset": tuned.data.dataset}
    if given or config.file is not None:
        files_of_run = dict.fromkeys(("train_file", "validation_file", "test_file"))
        base = dataclasses.replace(base, **files_of_run)
    return dataclasses.replace(base, **given, **fields)


def _classes(task: Task, tuned: FinetuneConfig) -> tuple[str, ...]:
    """Classes in the order of the model's outputs; the task must have the same."""
    model = tuned.model
    if task.head != model.head:
        raise ValueError(
            f"--task {task.name} needs a model for {task.head}, the run's is for "
            f"{model.head}"
        )
    if model.head != "classification":
        return task.labels
    if not set(task.labels) <= set(model.labels):
        raise ValueError(
            f"--task {task.name} has the classes {', '.join(task.labels)}, the model "
            f"{', '.join(model.labels)}"
        )
    return model.labels


def _tables(
    config: PredictConfig, data: TaskDataConfig, task: Task
) -> Iterator[tuple[str, Table, str]]:
    """Name, rows and origin of each split to predict."""
    if config.file is not None:
        where = f"--file {config.file}"
        path = pathlib.Path(config.file).expanduser()
        yield "file", read_rows(path, where), where
        return
    names = task.test if config.split == "test" else task.validation
    if data.files:
        value = getattr(data, f"{config.split}_file")
        if value is None:
            raise ValueError(
                f"--split {config.split}: the run had no --{config.split}-file; give "
                "the rows by --file"
            )
        where = f"--{config.split}-file {value} of the run"
        yield config.split, read_rows(pathlib.Path(value).expanduser(), where), where
        return
    if data.dataset is None and task.dataset is None:
        raise ValueError("give the rows to predict by --file or --dataset")
    found = tables.read_dataset(data, task)
    chosen = [name for name in names if name in found.splits]
    if not chosen:
        raise ValueError(
            f"--split {config.split}: {found.source} has no split "
            f"{' or '.join(names) or config.split}, only {', '.join(found.splits)}"
        )
    for name in chosen:
        yield name, found.splits[name], found.where[name]
