"""Presets of runs: the default, and published shapes and settings."""

import dataclasses

from models.config import PRESETS as MODELS
from models.config import LlamaConfig
from train.config.data_config import DataConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.pretrain_config import PresetName, PretrainConfig
from train.config.run_config import CheckpointConfig


def _published(
    preset: PresetName,
    rank: int,
    learning_rate: float = 1e-3,
    batch_size_sequences: int = 256,
    update_interval: int = 200,
) -> PretrainConfig:
    """Run as in the SubTrack++ paper: 10,000 steps, 256-token sequences, bfloat16."""
    model = dataclasses.replace(
        MODELS[preset], dtype="bfloat16", param_dtype="bfloat16"
    )
    return PretrainConfig(
        model=model,
        preset=preset,
        steps=10_000,
        eval_every_steps=1_000,
        data=DataConfig(
            sequence_length_tokens=256, batch_size_sequences=batch_size_sequences
        ),
        optimizer=OptimizerConfig(
            rank=rank,
            learning_rate=learning_rate,
            update_interval=update_interval,
            eps=1e-6,
        ),
        checkpoint=CheckpointConfig(checkpoint_every_steps=1_000),
    )


# The papers give no settings for the three smallest models; they use those of 60M, with
# a rank of a quarter of the width.
PRESETS: dict[str, PretrainConfig] = {
    config.preset: config
    for config in [
        PretrainConfig(
            model=LlamaConfig(2048, 256, 688, num_layers=4, num_heads=4),
            optimizer=OptimizerConfig(
                rank=64, update_interval=50, learning_rate=3e-3, eps=1e-6
            ),
        ),
        _published("llama-9m", rank=32),
        _published("llama-20m", rank=64),
        _published("llama-35m", rank=96),
        _published("llama-60m", rank=128),
        _published("llama-130m", rank=256),
        _published("llama-350m", rank=256, batch_size_sequences=128),
        _published("llama-1b", 512, learning_rate=1e-4, batch_size_sequences=16),
        _published("llama-3b", 512, learning_rate=1e-4, batch_size_sequences=16),
        _published(
            "llama-7b",
            rank=1024,
            learning_rate=1e-4,
            batch_size_sequences=16,
            update_interval=500,
        ),
    ]
}
