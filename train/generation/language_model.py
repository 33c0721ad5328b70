"""Loading of a model to generate text: a run, or Hugging Face's layout."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import llama, llama_weights, safetensors_files
from train.config.run_config import BEST_OR_NEWEST, CheckpointChoice
from train.rundir import trained_model as trained
from train.tokenization.tokenizer import Tokenizer

# transformers' default for a config.json without the entry.
_POSITIONS = 2048


class LanguageModel(NamedTuple):
    """A model with its tokenizer.

    Attributes:
      model: the model.
      tokenizer: its tokenizer.
      positions: maximum number of tokens in training.
      description: its directory, and for a run the checkpoint.
    """

    model: llama.Llama
    tokenizer: Tokenizer
    positions: int
    description: str


def load(
    directory: pathlib.Path, choice: CheckpointChoice = BEST_OR_NEWEST
) -> LanguageModel:
    """Loads a model and its tokenizer.

    Args:
      directory: a run's `--output-dir`, or a model in Hugging Face's layout:
        config.json, safetensors files, tokenizer.
      choice: which checkpoint of a run.

    Raises:
      ValueError: the directory contains neither, or is damaged.
      CheckpointError: a run has no checkpoint, or a damaged one.
      OSError: a file cannot be read.
    """
    if not (directory / safetensors_files.CONFIG_FILE).exists():
        raise ValueError(
            f"--checkpoint {directory} is not the directory of a run, nor that of a "
            f"Hugging Face model: it has no {safetensors_files.CONFIG_FILE}"
        )
    if trained.is_hugging_face(directory):
        return _of_hugging_face(directory, choice)
    run = trained.load(directory, choice)
    return LanguageModel(
        _build(run.config.model, run.params),
        run.tokenizer,
        run.config.positions,
        f"{directory}, {run.checkpoint.description}",
    )


def _of_hugging_face(
    directory: pathlib.Path, choice: CheckpointChoice
) -> LanguageModel:
    if choice != BEST_OR_NEWEST:
        flag = "--which" if choice.step is None else "--step"
        raise ValueError(
            f"{flag} chooses among the checkpoints of a run; {directory} is a model in "
            "Hugging Face's layout and has none"
        )
    tokenizer = Tokenizer.load(directory)
    config, params = llama_weights.load(directory)
    if tokenizer.vocabulary_size > config.vocabulary_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocabulary_size} tokens and "
            f"the model {config.vocabulary_size}: it belongs to another model"
        )
    positions = config.max_length_tokens or _POSITIONS
    return LanguageModel(_build(config, params), tokenizer, positions, str(directory))


def _build(config: llama.LlamaConfig, params: Any) -> llama.Llama:
    if jax.default_backend() == "cpu":  # bfloat16 is several times slower there
        config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, config.param_dtype), params)
    return nnx.merge(llama.definition(config), params)
