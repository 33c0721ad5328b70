"""Messages of a fine-tuning run: summary, next commands."""

import shlex

from train.config.finetune_config import FINETUNE, FinetuneConfig
from train.config.finetune_presets import PRESETS
from train.finetuning.task_data import TaskData
from train.loop.messages import model_and_optimizer
from train.rundir.saved_config import CONFIG_FILE
from train.step.train_state import TrainState


def summary(config: FinetuneConfig, data: TaskData, state: TrainState) -> str:
    """Summary of model, optimizer and rows at the start of a run."""
    preset = PRESETS[config.preset].optimizer
    frozen = [] if config.freeze == "none" else [f"{config.freeze} stay frozen"]
    name = f"{config.init_from}, {config.model.family}"
    splits = (data.train, *data.validation, *data.test)
    rows = ", ".join(f"{len(split):,} {split.name}" for split in splits)
    classes = f" ({', '.join(data.classes)})" if data.classes else ""
    return model_and_optimizer(name, config.optimizer, preset, state, *frozen) + (
        f"Task       {data.task.name}{classes}, by {data.task.metrics[0]}\n"
        f"Rows       {rows}; from {data.source}\n"
        f"Steps      {config.steps:,} of {config.data.batch_size_examples:,} rows\n"
        f"Output     {config.output_dir}"
    )


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
