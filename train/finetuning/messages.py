"""Messages of a fine-tuning run: summary, next commands."""

import shlex
from typing import Any

import jax

from train.config import methods
from train.config.finetune_config import FINETUNE, FinetuneConfig
from train.config.finetune_presets import PRESETS
from train.finetuning.task_data import TaskData
from train.rundir.saved_config import CONFIG_FILE
from train.step.train_state import TrainState


def summary(config: FinetuneConfig, data: TaskData, state: TrainState) -> str:
    """Summary of model, optimizer and rows at the start of a run."""

    def size(tree: Any) -> str:
        return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:.1f} MB"

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    base = PRESETS[config.preset].optimizer
    unused = ", ".join(methods.unused(config.optimizer, base))
    note = f"; it does not use {unused}" if unused else ""
    if config.freeze != "none":
        note += f"; {config.freeze} stay frozen"
    splits = (data.train, *data.validation, *data.test)
    rows = ", ".join(f"{len(split):,} {split.name}" for split in splits)
    classes = f" ({', '.join(data.classes)})" if data.classes else ""
    return (
        f"Model      {config.init_from}: {config.model.family}, {count / 1e6:.1f} M "
        f"parameters, {size(state.params)}\n"
        f"Optimizer  {config.optimizer.name}: state of {size(state.opt_state)}{note}\n"
        f"Task       {data.task.name}{classes}, by {data.task.metrics[0]}\n"
        f"Rows       {rows}; from {data.source}\n"
        f"Steps      {config.steps:,} of {config.data.batch_size_examples:,} rows\n"
        f"Output     {config.output_dir}"
    )


def resume(config: FinetuneConfig) -> str:
    """Command that resumes a run."""
    return f"{FINETUNE} --resume --output-dir {shlex.quote(str(config.output_dir))}"


def farewell(config: FinetuneConfig) -> str:
    """Lists commands to use a finished run."""
    place = config.output_dir
    directory, saved = (shlex.quote(str(path)) for path in (place, place / CONFIG_FILE))
    return (
        f"Results, metrics, curve, tokenizer, config and checkpoints are in {place}\n"
        f"Repeat     {FINETUNE} --config {saved} --seed 1 --output-dir ANOTHER\n"
        f"Predict    python -m train.predict --checkpoint {directory} --file ROWS "
        "--output-dir PREDICTIONS\n"
        f"Export     python -m train.export --checkpoint {directory} --to hf"
    )
