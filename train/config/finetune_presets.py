"""Presets of fine-tuning runs: a laptop's, and the published settings."""

import dataclasses

from train.config.finetune_config import OPTIMIZER, FinetuneConfig
from train.config.task_data_config import TaskDataConfig

_replace = dataclasses.replace

# The published runs have no warm-up on GLUE, and other decays of the moments than
# their full-rank baseline, which has Adam's usual ones.
_PUBLISHED = _replace(OPTIMIZER, learning_rate=1e-5, b1=0.908, b2=0.99)
_PUBLISHED_DATA = TaskDataConfig(max_length_tokens=512, batch_size_examples=16)

PRESETS: dict[str, FinetuneConfig] = {
    config.preset: config
    for config in [
        FinetuneConfig(),
        FinetuneConfig(
            preset="small",
            init_from="sentence-transformers/all-MiniLM-L6-v2",
            optimizer=_replace(OPTIMIZER, update_interval=50),
        ),
        FinetuneConfig(
            preset="glue-base",
            init_from="FacebookAI/roberta-base",
            epochs=30.0,
            data=_PUBLISHED_DATA,
            optimizer=_replace(_PUBLISHED, rank=4, warmup_fraction=0.0),
        ),
        FinetuneConfig(
            preset="superglue-large",
            init_from="FacebookAI/roberta-large",
            epochs=30.0,
            data=_PUBLISHED_DATA,
            optimizer=_replace(_PUBLISHED, warmup_fraction=0.1),
        ),
    ]
}

# Published settings that depend on the task: learning rate, batch size, interval of the
# subspaces.
_LEARNING_RATES = {"cola": 3e-5, "mrpc": 3e-5}
_BATCH_SIZES = {"cola": 32}
_INTERVALS = {"cb": 100, "copa": 100, "axg": 100, "wsc": 250}


def of_task(base: FinetuneConfig, task: str | None) -> FinetuneConfig:
    """A preset with the settings that were published for a task.

    Args:
      base: the preset; others than the published ones stay as they are.
      task: the task's name.
    """
    if task is None or base != PRESETS.get(base.preset):
        return base
    if base.preset == "glue-base":
        rate = _LEARNING_RATES.get(task, base.optimizer.learning_rate)
        size = _BATCH_SIZES.get(task, base.data.batch_size_examples)
        data = _replace(base.data, batch_size_examples=size)
        optimizer = _replace(base.optimizer, learning_rate=rate)
        return _replace(base, data=data, optimizer=optimizer)
    if base.preset == "superglue-large":
        interval = _INTERVALS.get(task, base.optimizer.update_interval)
        return _replace(
            base, optimizer=_replace(base.optimizer, update_interval=interval)
        )
    return base
