"""Export of a trained model to Hugging Face's layout."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from models import encoder_weights, llama_weights
from train.config.finetune_config import FinetuneConfig
from train.generation.export_config import ExportConfig
from train.rundir import trained_model as trained
from train.rundir.checkpoints import CheckpointError, quiet_orbax
from train.system import compilation_cache, console, files
from train.tokenization import special_tokens
from train.tokenization.pairs import PairTokenizer


def run(config: ExportConfig) -> None:
    """Runs the export program and prints the directory."""
    compilation_cache.use(config.start)
    quiet_orbax()
    with console.user_errors(ValueError, OSError, CheckpointError):
        directory = export(config)
    print(f"Written to {directory}")


def export(config: ExportConfig) -> pathlib.Path:
    """Exports a model atomically; returns the directory.

    Raises:
      ValueError, CheckpointError, OSError: the model cannot be read or written.
    """
    target = (config.output_dir or config.checkpoint / config.to).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output-dir {target} is not empty: give another directory")
    write, description = _opened(config)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output-dir {target}: {error.strerror}") from error
    with files.replacing(target) as directory:
        directory.mkdir()
        write(directory)
    print(f"Exported {description}")
    return target


def _opened(config: ExportConfig) -> tuple[Callable[[pathlib.Path], None], str]:
    """A function that writes the model of a run to a directory, and its description."""
    directory, choice = config.checkpoint, config.choice
    if trained.program(directory) == "finetune":
        tuned = trained.load_config_of(FinetuneConfig, directory)
        restored = trained.load_params(directory, tuned.model, choice)
        write = functools.partial(_write_encoder, directory, tuned, restored.params)
        return write, f"step {restored.step:,}"
    model = trained.load(directory, choice)
    write = functools.partial(_write_hugging_face, model)
    return write, model.checkpoint.description


def _write_encoder(
    run: pathlib.Path, config: FinetuneConfig, params: Any, directory: pathlib.Path
) -> None:
    files_of_run = PairTokenizer(run, config.data.max_length_tokens).files
    encoder_weights.save(directory, config.model, params, tokenizer_files=files_of_run)


def _write_hugging_face(model: trained.Trained, directory: pathlib.Path) -> None:
    tokenizer = model.tokenizer
    length = model.config.positions
    tokenizer.save(directory)
    path = directory / special_tokens.TOKENIZER_FILE
    settings = special_tokens.read_json(path)
    settings |= {
        "tokenizer_class": _tokenizer_class(directory),
        "model_max_length": length,
    }
    files.write_whole(path, json.dumps(settings, indent=2) + "\n")
    llama_weights.save(
        directory,
        model.config.model,
        model.params,
        extra_config={
            **special_tokens.ids(tokenizer.special),
            "max_position_embeddings": length,
        },
    )


def _tokenizer_class(directory: pathlib.Path) -> str:
    """Name of the tokenizer class in transformers that gives the same tokens."""
    if (directory / "tokenizer.json").exists():
        return "PreTrainedTokenizerFast"
    from sentencepiece import sentencepiece_model_pb2  # only where there is a model

    content = (directory / "tokenizer.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    normalizer = model.normalizer_spec
    if (
        model.trainer_spec.model_type != model.trainer_spec.BPE
        or normalizer.name != "identity"
        or normalizer.remove_extra_whitespaces
        or not normalizer.add_dummy_prefix
    ):
        raise ValueError(
            "the run's SentencePiece model is not of LLaMA's kind (BPE of unchanged "
            "text), and transformers would give other tokens: put the same tokenizer "
            "into the run's directory as tokenizer.json"
        )
    return "LlamaTokenizer"
