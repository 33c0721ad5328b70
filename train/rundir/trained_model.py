"""Loading of a trained model from the directory of a run."""

import pathlib
from typing import Any, NamedTuple, TypeVar

from flax import nnx

from models import llama
from train.config.finetune_config import FinetuneConfig
from train.config.pretrain_config import PretrainConfig
from train.config.run_config import BEST_OR_NEWEST, CheckpointChoice, RunConfig
from train.config.sft_config import SftConfig
from train.rundir.checkpoint_reading import Restored, restore_params
from train.rundir.saved_config import CONFIG_FILE, load_config
from train.step.architectures import Architecture, abstract_params
from train.system import console
from train.tokenization import special_tokens
from train.tokenization.tokenizer import Tokenizer

Config = TypeVar("Config", bound=RunConfig)
_KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "sft": SftConfig}


class Trained(NamedTuple):
    """Parameters of a run's model, with its config and tokenizer."""

    config: PretrainConfig | SftConfig
    checkpoint: Restored
    tokenizer: Tokenizer

    @property
    def params(self) -> Any:
        """The model's parameters, as nested dictionaries."""
        return self.checkpoint.params

    @property
    def model(self) -> llama.Llama:
        """The model with its parameters."""
        return nnx.merge(llama.definition(self.config.model), self.params)


def is_hugging_face(directory: pathlib.Path) -> bool:
    """Whether a directory contains a model in Hugging Face's layout, not a run.

    Raises:
      ValueError: config.json is damaged.
      OSError: config.json cannot be read.
    """
    entries = special_tokens.read_json(directory / CONFIG_FILE)
    return "model_type" in entries or "architectures" in entries


def load(directory: pathlib.Path, choice: CheckpointChoice = BEST_OR_NEWEST) -> Trained:
    """Loads a checkpoint of a run; warns of damaged ones that it skips.

    Args:
      directory: the run's `--output-dir`.
      choice: which checkpoint.

    Raises:
      ValueError: there is no run in the directory, it was saved by another version, or
        it has no such checkpoint.
      CheckpointError: it has no checkpoint, or a damaged one.
      OSError: a file cannot be read.
    """
    kind = SftConfig if program(directory) == "sft" else PretrainConfig
    config = load_config_of(kind, directory)
    checkpoint = load_params(directory, config.model, choice)
    tokenizer = Tokenizer.load(directory)
    if isinstance(config, SftConfig):
        return Trained(config, checkpoint, tokenizer)
    # Files of earlier versions may set a begin token that was not used in training.
    tokenizer.mark_documents(
        begin=config.data.begins_documents, end=config.data.ends_documents
    )
    return Trained(config, checkpoint, tokenizer)


def program(directory: pathlib.Path) -> str:
    """Program that a run belongs to: pretrain, finetune or sft.

    Raises:
      ValueError: config.json is damaged.
      OSError: config.json cannot be read.
    """
    data = special_tokens.read_json(directory / CONFIG_FILE).get("data")
    fields = {"task": "finetune", "template": "sft"}
    given = data if isinstance(data, dict) else {}
    return next((fields[name] for name in fields if name in given), "pretrain")


def load_config_of(kind: type[Config], directory: pathlib.Path) -> Config:
    """Loads the config of a run.

    Args:
      kind: its class; runs of other programs are refused.
      directory: the run's `--output-dir`.

    Raises:
      ValueError: there is no run of this kind in the directory.
      OSError: the file cannot be read.
    """
    saved = directory / CONFIG_FILE
    if not saved.exists():
        raise ValueError(
            f"--checkpoint {directory} is not the directory of a run: it has no "
            f"{CONFIG_FILE}"
        )
    if is_hugging_face(directory):
        raise ValueError(
            f"--checkpoint {directory} is not the directory of a run but a model in "
            "Hugging Face's layout already"
        )
    own = program(directory)
    if kind is not _KINDS[own]:
        raise ValueError(
            f"--checkpoint {directory} is a run of train.{own}, whose model this "
            "program does not use"
        )
    return load_config(kind, saved)


def load_params(
    directory: pathlib.Path,
    model: Architecture,
    choice: CheckpointChoice = BEST_OR_NEWEST,
) -> Restored:
    """Restores parameters of a run; warns of damaged checkpoints that it skips.

    Raises:
      ValueError: there is no such checkpoint.
      CheckpointError: there is none, or a damaged one.
    """
    return restore_params(directory, abstract_params(model), choice, console.warn)
