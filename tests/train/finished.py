"""The directory of a small run that has finished, without running one."""

import dataclasses
import pathlib

import grain
import jax

from models.llama import LlamaConfig
from train.config.presets import PRESETS
from train.config.run_config import CheckpointConfig
from train.rundir.checkpoints import CHECKPOINTS, Checkpoints
from train.rundir.saved_config import CONFIG_FILE, save_config
from train.step import optimizers
from train.step.setup import llama_setup
from train.tokenization.tokenizer import Tokenizer

# Large enough for every part of the model to show in the logits.
MODEL = LlamaConfig(
    300, 32, 48, num_layers=2, num_heads=4, num_key_value_heads=2, init_std=0.2
)
STEP = 10


def make_run(directory: pathlib.Path, tokenizer: Tokenizer, model=MODEL):
    """Writes what programs read of a run; returns its config and parameters."""
    tiny = PRESETS["tiny"]
    data = dataclasses.replace(
        tiny.data,
        bos=not tokenizer.ends_texts,
        bos_and_eos=tokenizer.ends_texts and tokenizer.begins_texts,
    )
    config = dataclasses.replace(
        tiny,
        model=model,
        data=data,
        optimizer=dataclasses.replace(tiny.optimizer, rank=8),
        output_dir=directory,
    )
    directory.mkdir(parents=True)
    save_config(config, directory / CONFIG_FILE)
    tokenizer.save(directory)
    optimizer = optimizers.make_optimizer(config.optimizer, 1e-3, seed=0)
    setup = llama_setup(model, optimizer, lambda _: 1e-3)
    state = setup.create_state(jax.random.key(0))
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        batches = iter(grain.MapDataset.range(10).to_iter_dataset())
        checkpoints.save(STEP, state, batches)
    return config, state.params


def damage(directory: pathlib.Path) -> None:
    """Truncates the parameters."""
    for path in (directory / CHECKPOINTS / str(STEP) / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
