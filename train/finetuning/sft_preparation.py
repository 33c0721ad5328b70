"""Opens what supervised fine-tuning starts from: model, tokenizer, conversations."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

from models import llama_config_file
from models.config import LlamaConfig
from train.config.sft_config import SftConfig
from train.conversations.chat_template import ChatTemplate
from train.finetuning import preparation
from train.finetuning.conversation_batches import training_batches
from train.finetuning.conversation_data import ConversationData, open_data
from train.finetuning.preparation import Report
from train.tokenization.tokenizer import Tokenizer


class Prepared(NamedTuple):
    """What a run starts from.

    Attributes:
      config: the run, with its model and its length in steps.
      data: its conversations.
      tokenizer: the tokenizer of the weights, with the run's chat template.
      weights: directory of the weights; None if the run's checkpoints have them.
    """

    config: SftConfig
    data: ConversationData
    tokenizer: Tokenizer
    weights: pathlib.Path | None


def prepare(config: SftConfig, report: Report) -> Prepared:
    """Reads the shape of the model, opens the conversations, and counts the steps.

    Args:
      config: the run, from the command line.
      report: called with one-line warnings.

    Raises:
      ValueError: flags, rows and model do not fit each other.
      OSError: a file cannot be read, or the hub not be reached.
    """
    weights = None
    if config.start.resume and config.model is not None:
        model, directory = config.model, config.output_dir
    else:
        weights = directory = _find_weights(config)
        model = _read_model(config, weights)
    tokenizer = _open_tokenizer(directory, model)
    template = ChatTemplate.open(config.data.template, tokenizer)
    template.keep()
    data = open_data(config.data, template, config.seed, report)
    longest, length = model.max_length_tokens, config.data.sequence_length_tokens
    if longest is not None and length > longest:
        report(
            f"--sequence-length-tokens {length} is more than the {longest} tokens that "
            "the weights were trained to read"
        )
    config = dataclasses.replace(config, model=model)
    rows = training_batches(config.data, data.train, config.seed, slice(None))
    per_epoch = -(-len(rows) // config.data.batch_size_sequences)
    config = preparation.with_steps(config, per_epoch)
    preparation.warn_of_interval(config, report)
    return Prepared(config, data, tokenizer, weights)


def read_weights(prepared: Prepared) -> Any:
    """Parameters of the weights, as nested dictionaries of NumPy arrays.

    Raises:
      ValueError: they are damaged.
      OSError: a file cannot be read.
    """
    from models import llama_weights  # slow to import

    dtype = prepared.config.param_dtype
    return llama_weights.load(prepared.weights, param_dtype=dtype)[1]


def _find_weights(config: SftConfig) -> pathlib.Path:
    if config.init_from is None:
        raise ValueError(
            "--init-from is needed, the LLaMA to start from: a directory with "
            "config.json, model.safetensors and tokenizer.json, or a name on the hub "
            "(HuggingFaceTB/SmolLM2-135M-Instruct)"
        )
    return preparation.directory_of(config.init_from)


def _read_model(config: SftConfig, directory: pathlib.Path) -> LlamaConfig:
    model = llama_config_file.load_config(
        directory, dtype=config.dtype, param_dtype=config.param_dtype
    )
    return dataclasses.replace(model, remat=config.remat)


def _open_tokenizer(directory: pathlib.Path, model: LlamaConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    preparation.check_vocabulary(tokenizer, model, directory)
    return tokenizer
