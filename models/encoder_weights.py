"""Import and export of BERT, RoBERTa and MPNet weights in Hugging Face's layout."""

import dataclasses
import functools
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from models import parameters, safetensors_files, weights
from models.encoder import Encoder, abstract_params
from models.encoder_config import EncoderConfig
from models.encoder_config_file import export_config, load_config, stored_head
from models.encoder_tensors import (
    HEAD,
    OTHER_HEADS,
    POOLER,
    encoder_places,
    is_tensor,
    renamed,
)
from models.weights import MAX_SHARD_BYTES, Place

__all__ = ["Loaded", "load", "load_config", "save"]

# Fields of the config that the files do not determine.
_FREE = (
    "head",
    "labels",
    "dropout",
    "attention_dropout",
    "head_dropout",
    "init_std",
    "dtype",
    "param_dtype",
    "remat",
)


class Loaded(NamedTuple):
    """Parameters from files, and what the files had too much or too little.

    Attributes:
      params: nested dictionaries of NumPy arrays.
      unused: names of tensors in the files that the model does not use.
      new: paths of parameters that the files do not have, drawn from the key.
    """

    params: dict[str, Any]
    unused: tuple[str, ...]
    new: tuple[str, ...]


def load(
    directory: str | os.PathLike[str],
    config: EncoderConfig,
    key: jax.Array,
    *,
    new_head: bool = False,
) -> Loaded:
    """Loads an encoder from a directory with config.json and safetensors files.

    Names may begin with the model's, as in `bert.encoder.layer.0...`, and norms may
    have the old names gamma and beta. Checks names and shapes of all tensors before
    reading any.

    Args:
      directory: contains config.json and either model.safetensors or
        model.safetensors.index.json with the files that it lists.
      config: `load_config(directory)`, with the head, labels, dropout rates, dtypes
        and rematerialisation of one's choice.
      key: PRNG key for parameters that the files do not have. Only the head, and the
        pooler, may be missing.
      new_head: draw a new head although the files have one, for other labels.

    Raises:
      ValueError: the config does not match config.json; the head in the files is for
        another task or other labels; a tensor other than the head's is missing,
        unknown, of another shape or not finite; or a file is damaged.
      OSError: a file is missing.
    """
    directory = pathlib.Path(directory)
    _check_shape(directory, config)
    prefix = config.family + "."
    names = [
        renamed(name, prefix)
        for name, _ in safetensors_files.shapes(directory, is_tensor)
    ]
    has_head = any(name.startswith(HEAD) for name in names)
    has_pooler = any(name.startswith(POOLER) for name in names)
    if has_head and not new_head:
        _check_head(directory, config)
    places, shapes = encoder_places(config), abstract_params(config)
    new = {
        name: place
        for name, place in places.items()
        if (name.startswith(HEAD) and (new_head or not has_head))
        or (name.startswith(POOLER) and not has_pooler)
    }
    present = {name: place for name, place in places.items() if name not in new}
    unused = []

    def rename(stored: str) -> str | None:
        name = renamed(stored, prefix)
        is_spare = OTHER_HEADS.search(name) or name.startswith((HEAD, POOLER))
        if not is_tensor(stored) or (is_spare and name not in present):
            return None
        return name

    for name, _ in safetensors_files.shapes(directory, is_tensor):
        if rename(name) is None:
            unused.append(name)
    weights.check(
        directory,
        present,
        shapes,
        rename,
        supported=f"only the weights of a plain {config.family} are supported",
        advice=lambda missing: "fetch the files anew, or correct config.json",
    )
    params = weights.read(directory, present, shapes, rename)
    _draw(params, new.values(), config, key)
    paths = tuple("/".join(place.path) for place in new.values())
    return Loaded(params, tuple(unused), paths)


def _check_shape(directory: pathlib.Path, config: EncoderConfig) -> None:
    """Raises a ValueError if the config is not that of the files."""
    theirs = load_config(directory)
    for field in dataclasses.fields(config):
        ours, stored = getattr(config, field.name), getattr(theirs, field.name)
        if field.name not in _FREE and ours != stored:
            raise ValueError(
                f"the config has {field.name}={ours!r}, but config.json in {directory} "
                f"implies {stored!r}: change only the head, dropout and dtypes"
            )


def _check_head(directory: pathlib.Path, config: EncoderConfig) -> None:
    """Raises a ValueError if the head in the files is for something else."""
    stored = stored_head(directory)
    if stored == (config.head, config.labels):
        return
    advice = "use these, or draw a new head (new_head=True)"
    if stored.head is None:
        theirs = "another task"
        advice = "draw a new head (new_head=True)"
    elif stored.head == config.head:
        theirs = f"the labels {', '.join(stored.labels)}"
    else:
        theirs = stored.head
    wanted = config.head
    if config.labels:
        wanted += f" with the labels {', '.join(config.labels)}"
    raise ValueError(
        f"the head in {directory} is for {theirs}, but {wanted} is wanted: {advice}"
    )


def _draw(
    params: Any, places: Iterable[Place], config: EncoderConfig, key: jax.Array
) -> None:
    """Writes initial values to the places, as a new `Encoder` has them."""
    paths = [place.path for place in places]

    def leaf(tree: Any, path: tuple[str, ...]) -> Any:
        return functools.reduce(operator.getitem, path, tree)

    @jax.jit  # only what is returned is computed
    def draw(key: jax.Array) -> list[jax.Array]:
        initial = parameters.initial(functools.partial(Encoder, config), key)
        return [leaf(initial, path) for path in paths]

    for path, values in zip(paths, draw(key) if paths else [], strict=True):
        leaf(params, path)[...] = np.asarray(values)


def save(
    directory: str | os.PathLike[str],
    config: EncoderConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Saves an encoder as a directory that transformers can load, see `weights.save`.

    transformers' class is that of the head: ForSequenceClassification, or
    ForMultipleChoice.

    Args:
      directory: created if missing. It may contain other files, but no model.
      config: the model's config. Tensors are written in `config.param_dtype`.
      params: nested dictionaries of arrays: `nnx.to_pure_dict(nnx.state(model,
        nnx.Param))`.
      max_shard_bytes: maximum bytes of tensors per file.
      extra_config: more entries of config.json, see `export_config`.
      tokenizer_files: files to copy into the directory.

    Raises:
      ValueError: the parameters do not match the config, or `extra_config` has an
        entry that the config determines.
      OSError: the directory already contains a model, or cannot be written to.

    >>> import tempfile
    >>> import jax
    >>> from flax import nnx
    >>> from models import encoder, encoder_weights
    >>> config = encoder.EncoderConfig(
    ...     "roberta", 64, 16, 32, 2, 4, 24, 1, 1, labels=("no", "yes")
    ... )
    >>> model = encoder.Encoder(config, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     encoder_weights.save(directory, config, params)
    ...     assert encoder_weights.load_config(directory) == config
    ...     loaded = encoder_weights.load(directory, config, jax.random.key(0))
    >>> loaded.unused, loaded.new
    ((), ())
    """
    prefix = config.family + "."
    places = {
        name if name.startswith(HEAD) else prefix + name: place
        for name, place in encoder_places(config).items()
    }
    weights.save(
        directory,
        export_config(config, extra_config),
        places,
        abstract_params(config),
        params,
        max_shard_bytes=max_shard_bytes,
        files=tokenizer_files,
    )
