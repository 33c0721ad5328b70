"""Import and export of LLaMA weights in Hugging Face's layout."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from models import safetensors_files, weights
from models.config import Float, LlamaConfig
from models.llama import abstract_params
from models.llama_config_file import export_config, load_config
from models.weights import MAX_SHARD_BYTES, Place

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_LAYER_TENSORS = {
    "input_layernorm.weight": ("attention_norm", "scale"),
    "self_attn.q_proj.weight": ("attention", "query", "kernel"),
    "self_attn.k_proj.weight": ("attention", "key", "kernel"),
    "self_attn.v_proj.weight": ("attention", "value", "kernel"),
    "self_attn.o_proj.weight": ("attention", "output", "kernel"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "mlp.gate_proj.weight": ("mlp", "gate", "kernel"),
    "mlp.up_proj.weight": ("mlp", "up", "kernel"),
    "mlp.down_proj.weight": ("mlp", "down", "kernel"),
}
# Rotary frequencies in old files: redundant, the config determines them.
_IGNORED = re.compile(r"\brotary_emb\.inv_freq$")


def _places(config: LlamaConfig) -> dict[str, Place]:
    """Maps tensor names to positions in the tree, in order of the computation."""
    places = {_EMBEDDING: Place(("embedding", "embedding"))}
    for layer in range(config.num_layers):
        for name, path in _LAYER_TENSORS.items():
            places[f"model.layers.{layer}.{name}"] = Place(("layers", *path), layer)
    places["model.norm.weight"] = Place(("norm", "scale"))
    if not config.tie_embeddings:
        places[_HEAD] = Place(("head", "kernel"))
    return places


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a LLaMA from a directory with config.json and safetensors files.

    Checks names and shapes of all tensors before reading any. At most one tensor is
    in memory beside the parameters.

    Args:
      directory: contains config.json and either model.safetensors or
        model.safetensors.index.json with the files that it lists.
      dtype: dtype of the computation; None: the stored dtype of the parameters.
      param_dtype: dtype of the parameters; None: that of config.json, float32 for
        float16.

    Returns:
      The config, and the parameters as nested dictionaries of NumPy arrays; place
      them with `nnx.update(model, params)`, or `jax.device_put` and shardings.

    Raises:
      ValueError: the model is not a LLaMA that `Llama` can compute, its tensors do
        not match config.json or are not finite, or a file is damaged.
      OSError: a file is missing.
    """
    directory = pathlib.Path(directory)
    config = load_config(directory, dtype=dtype, param_dtype=param_dtype)
    places, shapes = _places(config), abstract_params(config)

    def rename(stored: str) -> str | None:
        is_spare = stored == _HEAD and config.tie_embeddings
        return None if is_spare or _IGNORED.search(stored) else stored

    weights.check(
        directory,
        places,
        shapes,
        rename,
        supported="only the weights of a LLaMA without biases are supported",
        advice=_advice,
    )
    params = weights.read(directory, places, shapes, rename)
    if config.tie_embeddings:
        _check_spare_head(directory, params["embedding"]["embedding"])
    return config, params


def _check_spare_head(directory: pathlib.Path, embedding: np.ndarray) -> None:
    """Raises a ValueError if a tied model also stores a head of its own."""
    for _, head in safetensors_files.read(directory, lambda name: name == _HEAD):
        if not np.array_equal(head.astype(embedding.dtype), embedding):
            raise ValueError(
                f"{_HEAD} in {directory} is not the embedding, although config.json "
                "has tie_word_embeddings=True: set it to false to keep both"
            )


def _advice(missing: set[str]) -> str:
    if missing == {_HEAD}:
        return "if the embedding is the head, set tie_word_embeddings to true"
    return "fetch the files anew, or correct config.json"


def save(
    directory: str | os.PathLike[str],
    config: LlamaConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Saves a LLaMA as a directory that transformers can load, see `weights.save`.

    Args:
      directory: created if missing. It may contain other files, such as a
        tokenizer's, but no model.
      config: the model's config. Tensors are written in `config.param_dtype`.
      params: nested dictionaries of arrays: `nnx.to_pure_dict(nnx.state(model,
        nnx.Param))`.
      max_shard_bytes: maximum bytes of tensors per file (a larger tensor gets its own
        file); several files come with an index.
      extra_config: more entries of config.json, see `export_config`.

    Raises:
      ValueError: the parameters do not match the config, or `extra_config` has an
        entry that the config determines.
      OSError: the directory already contains a model, or cannot be written to.

    >>> import tempfile
    >>> from flax import nnx
    >>> from models import llama_weights, llama
    >>> config = llama.LlamaConfig(
    ...     64, 16, 32, num_layers=2, num_heads=2, max_length_tokens=256
    ... )
    >>> model = llama.Llama(config, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     llama_weights.save(directory, config, params)
    ...     loaded_config, loaded = llama_weights.load(directory)
    >>> loaded_config == config
    True
    >>> bool((loaded["head"]["kernel"] == params["head"]["kernel"]).all())
    True
    """
    weights.save(
        directory,
        export_config(config, extra_config),
        _places(config),
        abstract_params(config),
        params,
        max_shard_bytes=max_shard_bytes,
    )
