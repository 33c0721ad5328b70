"""Import and export of LLaMA weights in Hugging Face's layout.

A directory with config.json and safetensors files, read and written tensor by tensor,
without PyTorch or transformers. Hugging Face's kernels are `(out, in)`, one tensor
per layer; ours are `(in, out)` with all layers stacked.
"""

import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from models import safetensors_files
from models.config import Float, LlamaConfig
from models.hugging_face_config import CONFIG_FILE, export_config, load_config
from models.llama import abstract_params

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


class _Place(NamedTuple):
    """Position of one Hugging Face tensor in the tree of parameters."""

    path: tuple[str, ...]
    layer: int | None = None

    def view(self, params: Any) -> Any:
        """The tensor in Hugging Face's layout; a writable view for NumPy arrays."""
        leaf = params
        for key in self.path:
            leaf = leaf[key]
        if self.layer is not None:
            leaf = leaf[self.layer]
        return leaf.T if self.path[-1] == "kernel" else leaf

    def shape(self, shapes: Any) -> tuple[int, ...]:
        """The tensor's shape in Hugging Face's layout."""
        leaf = shapes
        for key in self.path:
            leaf = leaf[key]
        shape = leaf.shape if self.layer is None else leaf.shape[1:]
        return shape[::-1] if self.path[-1] == "kernel" else shape


def _places(config: LlamaConfig) -> dict[str, _Place]:
    """Maps tensor names to positions in the tree, in order of the computation."""
    places = {_EMBEDDING: _Place(("embedding", "embedding"))}
    for layer in range(config.num_layers):
        for name, path in _LAYER_TENSORS.items():
            places[f"model.layers.{layer}.{name}"] = _Place(("layers", *path), layer)
    places["model.norm.weight"] = _Place(("norm", "scale"))
    if not config.tie_embeddings:
        places[_HEAD] = _Place(("head", "kernel"))
    return places


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Float | None = None,
    param_dtype: Float | None = None,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a LLaMA from a directory with config.json and safetensors files.

    Checks names and shapes of all tensors before reading any. At most one tensor is
    in memory beside the parameters (two if a tied model also stores its head).

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
    _check_names(directory, config, places, shapes)
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    spare_head = None
    for name, tensor in safetensors_files.read(directory):
        if _IGNORED.search(name):
            continue
        if not (finite := np.isfinite(tensor)).all():
            raise ValueError(
                f"{name} in {directory} holds {np.count_nonzero(~finite):,} numbers "
                "that are NaN or infinite: the weights are damaged, or the run that "
                "made them diverged; use others"
            )
        if name in places:
            places[name].view(params)[...] = tensor
        else:
            spare_head = tensor
    if spare_head is not None:
        embedding = params["embedding"]["embedding"]
        if not np.array_equal(spare_head.astype(embedding.dtype), embedding):
            raise ValueError(
                f"{_HEAD} in {directory} is not the embedding, although config.json "
                "has tie_word_embeddings=True: set it to false to keep both"
            )
    return config, params


def _check_names(
    directory: pathlib.Path, config: LlamaConfig, places: dict[str, _Place], shapes: Any
) -> None:
    missing = set(places)
    for name, shape in safetensors_files.shapes(directory):
        if _IGNORED.search(name) or (name == _HEAD and config.tie_embeddings):
            continue
        if name not in missing:
            raise ValueError(
                f"{directory} holds {name} "
                + ("twice" if name in places else "which config.json does not describe")
                + ": only the weights of a LLaMA without biases are supported"
            )
        expected = places[name].shape(shapes)
        if shape != expected:
            raise ValueError(
                f"{name} in {directory} has the shape {shape}, but config.json "
                f"implies {expected}: one of the two belongs to another model"
            )
        missing.remove(name)
    if missing:
        raise ValueError(_missing(directory, missing))


def _missing(directory: pathlib.Path, names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    advice = "fetch the files anew, or correct config.json"
    if names == {_HEAD}:
        advice = "if the embedding is the head, set tie_word_embeddings to true"
    return f"{directory} lacks {len(names)} tensors ({first}): {advice}"


def save(
    directory: str | os.PathLike[str],
    config: LlamaConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5 * 10**9,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Saves a LLaMA as a directory that transformers can load.

    Files are renamed into place when all are written, config.json last, so that an
    interrupted export does not look like a model; the next export removes its
    leftovers. At most one file's tensors are in memory beside the parameters.

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
    >>> from models import hugging_face, llama
    >>> config = llama.LlamaConfig(
    ...     64, 16, 32, num_layers=2, num_heads=2, max_length_tokens=256
    ... )
    >>> model = llama.Llama(config, rngs=nnx.Rngs(0))
    >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     hugging_face.save(directory, config, params)
    ...     loaded_config, loaded = hugging_face.load(directory)
    >>> loaded_config == config
    True
    >>> bool((loaded["head"]["kernel"] == params["head"]["kernel"]).all())
    True
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    entries = export_config(config, extra_config)
    _check_params(config, params)
    directory = pathlib.Path(directory)
    for pattern in (CONFIG_FILE, "model*.safetensors", "model*.index.json"):
        for path in directory.glob(pattern):
            raise FileExistsError(
                f"{path} exists: export to a directory without a model"
            )
    staging = directory / "export.incomplete"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    places = _places(config)
    # Zeros broadcast to the real shapes: sizes without the memory.
    hollow = jax.tree.map(
        lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape),
        abstract_params(config),
    )
    files = safetensors_files.write(
        staging,
        {name: place.view(hollow).nbytes for name, place in places.items()},
        lambda name: np.ascontiguousarray(
            places[name].view(params), config.param_dtype
        ),
        max_shard_bytes,
    )
    safetensors_files.write_json(staging / CONFIG_FILE, entries)
    for file in [*files, CONFIG_FILE]:
        os.replace(staging / file, directory / file)
    staging.rmdir()


def _check_params(config: LlamaConfig, params: Mapping[str, Any]) -> None:
    def by_name(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    found, expected = by_name(params), by_name(abstract_params(config))
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the parameter {name} has the shape {found.get(name)}, but the config "
                f"implies {expected.get(name)}: export a model with its own config"
            )
