"""Opens what a fine-tuning run starts from: model, tokenizer, data, its length."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

from models import encoder_weights
from models.config import LlamaConfig
from models.encoder_config import EncoderConfig
from train.config import methods
from train.config.finetune_config import FinetuneConfig
from train.config.run_config import RunConfig
from train.config.sft_config import SftConfig
from train.finetuning.tables import read_tables
from train.finetuning.task_data import TaskData, open_data
from train.step import given_weights
from train.tokenization import hub
from train.tokenization.pairs import PairTokenizer
from train.tokenization.tokenizer import Tokenizer

Report = Callable[[str], None]
Config = TypeVar("Config", FinetuneConfig, SftConfig)


class Prepared(NamedTuple):
    """What a run starts from.

    Attributes:
      config: the run, with its model and its length in steps.
      data: its rows.
      tokenizer: the tokenizer of the weights.
      weights: directory of the weights; None if the run's checkpoints have them.
    """

    config: FinetuneConfig
    data: TaskData
    tokenizer: PairTokenizer
    weights: pathlib.Path | None


def prepare(config: FinetuneConfig, report: Report) -> Prepared:
    """Reads the shape of the model, opens the data, and counts the steps.

    Args:
      config: the run, from the command line.
      report: called with one-line warnings.

    Raises:
      ValueError: flags, rows and model do not fit each other.
      OSError: a file cannot be read, or the hub not be reached.
    """
    weights = None
    if config.start.resume and config.model is not None:
        model, tokenizer_directory = config.model, config.output_dir
    else:
        weights = tokenizer_directory = find_weights(config)
        model = read_model(config, weights)
    length, most = config.data.max_length_tokens, model.max_length_tokens
    if length > most:
        raise ValueError(
            f"--max-length-tokens {length} is more than the model reads: {most} of "
            f"its {model.num_positions} positions are for tokens"
        )
    tokenizer = PairTokenizer(tokenizer_directory, length)
    check_vocabulary(tokenizer, model, tokenizer_directory)
    data = open_data(
        config.data,
        model,
        tokenizer,
        config.seed,
        new_head=config.new_head and weights is not None,
        report=report,
    )
    head = data.task.head
    model = dataclasses.replace(
        model,
        head=head,
        labels=data.classes if head == "classification" else (),
    )
    if config.dropout is not None:
        model = dataclasses.replace(
            model,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            head_dropout=None,
        )
    config = dataclasses.replace(config, model=model)
    size = config.data.batch_size_examples
    config = with_steps(config, -(-len(data.train) // size))
    warn_of_interval(config, report)
    return Prepared(config, data, tokenizer, weights)


def find_weights(config: FinetuneConfig) -> pathlib.Path:
    """Directory of the weights; downloads them from the hub.

    Raises:
      ValueError: none are given, or the directory is that of a run.
      OSError: there are none of this name.
    """
    if config.init_from is None:
        if config.data.dataset is None and not config.data.files:
            read_tables(config.data, config.data.chosen_task)
        raise ValueError(
            "--init-from is needed, the encoder to start from: a directory with "
            "config.json, model.safetensors and tokenizer.json, or a name on the hub "
            "(FacebookAI/roberta-base)"
        )
    return directory_of(config.init_from)


def directory_of(init_from: str) -> pathlib.Path:
    """Directory of --init-from, downloaded if it is a name on the hub.

    Raises:
      ValueError: it has another layout.
      OSError: there are no weights of this name.
    """
    directory = pathlib.Path(init_from).expanduser()
    if not directory.exists():
        directory = hub.download_model(init_from)
    given_weights.check_layout(directory)
    return directory


def check_vocabulary(
    tokenizer: PairTokenizer | Tokenizer,
    model: EncoderConfig | LlamaConfig,
    directory: pathlib.Path,
) -> None:
    """Raises a ValueError if a tokenizer has more tokens than the model."""
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise ValueError(
            f"the tokenizer in {directory} has {tokenizer.vocabulary_size:,} tokens "
            f"and the model {model.vocabulary_size:,}: it belongs to another one"
        )


def read_model(config: FinetuneConfig, directory: pathlib.Path) -> EncoderConfig:
    """Shape of the weights, for the run's arithmetic.

    Raises:
      ValueError: they are not those of a supported encoder.
    """
    return encoder_weights.load_config(
        directory, dtype=config.dtype, param_dtype="float32"
    )


def read_weights(prepared: Prepared, report: Report) -> Any:
    """Parameters of the weights with a head for the task, as nested dictionaries.

    Raises:
      ValueError: they do not fit, or are damaged.
      OSError: a file cannot be read.
    """
    config = prepared.config
    loaded = encoder_weights.load(
        prepared.weights,
        config.model,
        jax.random.key(config.seed),
        new_head=config.new_head,
    )
    if loaded.unused:
        report(f"weights not used: {_listed(loaded.unused)}")
    if loaded.new:
        print(f"Drawn anew: {_listed(loaded.new)}")
    return loaded.params


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def with_steps(config: Config, per_epoch: int) -> Config:
    """The config with its length and its evaluations in steps.

    Args:
      config: the run.
      per_epoch: batches of an epoch.

    Raises:
      ValueError: the schedule does not fit the steps.
    """
    return dataclasses.replace(
        config,
        steps=config.steps or max(1, round(config.epochs * per_epoch)),
        eval_every_steps=config.eval_every_steps
        or max(1, round(config.eval_every_epochs * per_epoch)),
    )


def warn_of_interval(config: RunConfig, report: Report) -> None:
    """Warns of subspaces that stay as they are to the end of the run."""
    name = config.optimizer.name
    if not methods.has_subspaces(name) or methods.moves_on_every_step(name):
        return
    interval = methods.resolved(config.optimizer).update_interval
    if interval >= config.steps and name != "static":
        report(
            f"the subspaces never move: --update-interval {interval} is not below the "
            f"{config.steps} steps of the run"
        )
