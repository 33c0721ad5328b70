"""Runs from imported weights (--init-from): defaults, checks, parameters."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from models import llama_config_file
from models.config import LlamaConfig
from train.config.presets import PRESETS
from train.config.pretrain_config import PretrainConfig
from train.config.rules import flag
from train.tokenization import special_tokens
from train.tokenization.tokenizer import Tokenizer

# Presets are for random weights; their learning rates would destroy trained ones.
LEARNING_RATE = 1e-4
SEQUENCE_LENGTH_TOKENS = 256
# Text to compare tokenizers: those that agree on it hardly differ elsewhere.
_SAMPLE = 'The 3 whales of 1851 weren\'t seen; naïve sailors shouted: "Là!"\n\n\t{x_1}'
# Settings of the computation, not of the weights' shape.
_FREE = ("dtype", "param_dtype", "remat")


def defaults(base: PretrainConfig, directory: pathlib.Path) -> PretrainConfig:
    """Defaults of a run with `--init-from`.

    Args:
      base: a preset, or the config of another run.
      directory: the weights.

    Returns:
      The base with the shape of the weights. Unless it has `init_from` already, the
      learning rate is at most `LEARNING_RATE` and the rank at most a quarter of the
      width; a preset's sequence length is `SEQUENCE_LENGTH_TOKENS`, or the weights'
      maximum if that is shorter.

    Raises:
      ValueError: the weights are not those of a LLaMA.
      OSError: their config.json cannot be read.
    """
    model = _read_config(directory, base.model)
    data, optimizer = base.data, base.optimizer
    if base.init_from is None:
        rank = optimizer.rank
        if rank is not None:
            rank = min(rank, max(1, model.hidden_size // 4))
        rate = min(optimizer.learning_rate, LEARNING_RATE)
        optimizer = dataclasses.replace(optimizer, rank=rank, learning_rate=rate)
        if base == PRESETS[base.preset]:
            longest = model.max_length_tokens or SEQUENCE_LENGTH_TOKENS
            length = min(longest, SEQUENCE_LENGTH_TOKENS)
            data = dataclasses.replace(data, sequence_length_tokens=length)
    elif data.tokenizer == str(base.init_from):  # it belongs to the other weights
        data = dataclasses.replace(data, tokenizer=None)
    return dataclasses.replace(base, model=model, data=data, optimizer=optimizer)


def settle(config: PretrainConfig, report: Callable[[str], None]) -> PretrainConfig:
    """Checks the flags against the weights; resolves tokenizer and vocabulary size.

    Args:
      config: the run, from the command line.
      report: called with one-line warnings.

    Returns:
      The config with the given tokenizer or that of the weights, and, with
      --resize-embedding, the vocabulary size that it needs.

    Raises:
      ValueError: a flag contradicts the weights, or the tokenizer is too large.
      OSError: a file of the weights cannot be read.
    """
    directory = config.init_from
    if directory is None:
        if config.resize_embedding:
            raise ValueError(
                "--resize-embedding needs --init-from: random weights have an "
                "embedding of --vocabulary-size"
            )
        return config
    if config.start.resume:  # already done; the weights may have been deleted
        return config
    theirs, rows = _matching_shape(config)
    tokenizer = open_tokenizer(config)
    name = config.data.tokenizer or str(directory)
    needed = tokenizer.vocabulary_size
    if needed > theirs.vocabulary_size and not config.resize_embedding:
        raise ValueError(
            f"the tokenizer ({name}) has {needed:,} tokens, the embedding of "
            f"--init-from {directory} {rows:,} rows: enlarge it with "
            "--resize-embedding, or give the tokenizer of the weights"
        )
    size = max(needed, theirs.vocabulary_size)
    _note_tokens(config, tokenizer, report)
    length, longest = config.data.sequence_length_tokens, theirs.max_length_tokens
    if longest is not None and length > longest:
        report(
            f"--sequence-length-tokens {length} is more than the {longest} tokens that "
            "the weights were trained to read"
        )
    return dataclasses.replace(
        config,
        model=dataclasses.replace(theirs, vocabulary_size=size),
        data=dataclasses.replace(config.data, tokenizer=name),
    )


def _note_tokens(
    config: PretrainConfig, tokenizer: Tokenizer, report: Callable[[str], None]
) -> None:
    """Warns if the weights were probably trained with other tokens."""
    if tokenizer.begins_texts and not config.data.begins_documents:
        report(
            "the tokenizer of the weights begins texts with "
            f"{tokenizer.name(tokenizer.special.begin)}, documents do not: if the "
            "weights were trained so, give --bos-and-eos, or --bos if their documents "
            "had no end token"
        )
    name = config.data.tokenizer
    if name is None:
        return
    with contextlib.suppress(FileNotFoundError):  # no tokenizer beside the weights
        own = Tokenizer.load(config.init_from)
        if own.encode(_SAMPLE) != tokenizer.encode(_SAMPLE):
            report(
                f"--tokenizer {name} gives other tokens than the tokenizer in "
                f"--init-from {config.init_from}, with which the weights were trained"
            )


def open_tokenizer(config: PretrainConfig) -> Tokenizer:
    """Opens the given tokenizer, or else the one beside the weights."""
    directory = config.init_from
    name = config.data.tokenizer
    if name is not None:
        return Tokenizer.open(name, directory)
    try:
        return Tokenizer.load(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--init-from: {error}; give the tokenizer of the weights by --tokenizer"
        ) from error


def reader(config: PretrainConfig, *, now: bool) -> Callable[[], Any] | None:
    """Returns a function that reads the parameters; None without --init-from.

    Args:
      config: the run.
      now: read the parameters at once and hold them until the first call.

    Raises:
      ValueError, OSError: the weights are damaged; from the function, too.
    """
    if config.init_from is None:
        return None
    return held(lambda: load(config), now=now)


def held(read: Callable[[], Any], *, now: bool) -> Callable[[], Any]:
    """A function that reads parameters; `now`: at once, to hold them until its call.

    They are not held any longer: they are as large as the model.
    """
    early = [read()] if now else []
    return lambda: early.pop() if early else read()


def load(config: PretrainConfig) -> Any:
    """Loads the parameters as nested dictionaries of NumPy arrays.

    Raises:
      ValueError: they do not match the config, or are damaged.
      OSError: a file cannot be read.
    """
    from models import llama_weights  # slow to import

    _matching_shape(config)
    _, params = llama_weights.load(
        config.init_from, param_dtype=config.model.param_dtype
    )
    return grow(params, config.model.vocabulary_size)


def grow(params: Any, vocabulary_size: int) -> Any:
    """Enlarges embedding and head to a vocabulary size.

    New rows are the mean of the old ones: a new token looks like an average one, and
    logits of the old tokens do not change.
    """
    embedding = _grown(params["embedding"]["embedding"], vocabulary_size)
    params = params | {"embedding": {"embedding": embedding}}
    if "head" in params:
        kernel = _grown(params["head"]["kernel"].T, vocabulary_size).T
        params["head"] = {"kernel": kernel}
    return params


def _grown(rows: np.ndarray, count: int) -> np.ndarray:
    if count == len(rows):
        return rows
    mean = rows.mean(axis=0, dtype=np.float32, keepdims=True).astype(rows.dtype)
    return np.concatenate([rows, np.repeat(mean, count - len(rows), axis=0)])


def _read_config(directory: pathlib.Path, model: LlamaConfig) -> LlamaConfig:
    """Config of the weights, with dtypes and remat of the model."""
    check_layout(directory)
    theirs = llama_config_file.load_config(
        directory, dtype=model.dtype, param_dtype=model.param_dtype
    )
    return dataclasses.replace(theirs, remat=model.remat)


def check_layout(directory: pathlib.Path) -> None:
    """Raises an error unless a directory has a model in Hugging Face's layout.

    Raises:
      ValueError: it is the directory of a run, or config.json is damaged.
      OSError: there is no such directory, or no config.json.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"--init-from {directory} is not a directory: give the one with "
            "config.json and model.safetensors"
        )
    path = directory / llama_config_file.CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"--init-from {directory} has no {path.name}: give a model in Hugging "
            "Face's layout, that is config.json and model.safetensors; other formats "
            "(GGUF, adapters) have to be converted"
        )
    entries = special_tokens.read_json(path)
    if "model_type" not in entries and "output_dir" in entries:
        raise ValueError(
            f"--init-from {directory} is the directory of a run: export that "
            f"(python -m train.export --checkpoint {directory}), and give the exported "
            "directory"
        )


def _matching_shape(config: PretrainConfig) -> tuple[LlamaConfig, int]:
    """Config of the weights with the final vocabulary size, and their present size."""
    directory = config.init_from
    theirs = _read_config(directory, config.model)
    rows, size = theirs.vocabulary_size, config.model.vocabulary_size
    if config.resize_embedding and size > rows:
        theirs = dataclasses.replace(theirs, vocabulary_size=size)
    changed = _contradictions(config.model, theirs)
    if changed:
        advice = "leave such flags out"
        if size > rows:
            advice += ", or enlarge the embedding with --resize-embedding"
        raise ValueError(
            f"the weights of --init-from {directory} have another shape: "
            f"{'; '.join(changed)}; {advice}"
        )
    return theirs, rows


def _contradictions(model: LlamaConfig, theirs: LlamaConfig) -> list[str]:
    """Formats the fields that differ as "--flag 1 here, 2 there"."""
    ours, others = _spelled_out(model), _spelled_out(theirs)
    return [
        f"{flag(name)} {ours[name]} here, {others[name]} there"
        for name in ours
        if name not in _FREE and not _agree(ours[name], others[name])
    ]


def _spelled_out(model: LlamaConfig) -> dict[str, Any]:
    return dataclasses.asdict(model) | {
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_size,
    }


def _agree(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        # Files may have float32 values such as 9.999999747378752e-06.
        return math.isclose(value, other, rel_tol=1e-6)
    return value == other
