"""Presets of fine-tuning runs: a laptop's, and the published settings."""

import dataclasses

from train.config.epochs_config import OPTIMIZER
from train.config.finetune_config import FinetuneConfig
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


# Full-rank methods, for which the published baseline has Adam's usual decays.
_FULL_RANK = ("adamw", "muon", "adafactor")
# Methods whose scale is not alpha of the papers, or that have their own decays.
_OWN_SETTINGS = {
    "ldadam": {"scale": None, "b1": None, "b2": None},
    "apollo": {"scale": None},
    "apollo-mini": {"scale": None},
}


def adapted(
    base: FinetuneConfig, task: str | None, optimizer: str | None
) -> FinetuneConfig:
    """A preset with the settings of a task and of an optimizer.

    Args:
      base: the preset; other configs stay as they are.
      task: the task's name; None: not given.
      optimizer: the optimizer's name; None: not given.
    """
    if base != PRESETS.get(base.preset):
        return base
    settings = dict(_OWN_SETTINGS.get(optimizer, {}))
    if optimizer in _FULL_RANK:
        settings = {"b1": OPTIMIZER.b1, "b2": OPTIMIZER.b2}
    size = base.data.batch_size_examples
    if base.preset == "glue-base":
        size = _BATCH_SIZES.get(task, size)
        if task in _LEARNING_RATES:
            settings["learning_rate"] = _LEARNING_RATES[task]
    if base.preset == "superglue-large" and task in _INTERVALS:
        settings["update_interval"] = _INTERVALS[task]
    return _replace(
        base,
        data=_replace(base.data, batch_size_examples=size),
        optimizer=_replace(base.optimizer, **settings),
    )
