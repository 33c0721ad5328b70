"""Weights in Hugging Face's layout: tensors by name, checked, read and written.

A directory with config.json and safetensors files, read and written tensor by tensor,
without PyTorch or transformers. Hugging Face's kernels are `(out, in)`, one tensor
per layer; ours are `(in, out)` with all layers stacked. A model's own module knows the
names of its tensors.
"""

import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from models import safetensors_files
from models.safetensors_files import CONFIG_FILE

MAX_SHARD_BYTES = 5 * 10**9


class Place(NamedTuple):
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


Places = Mapping[str, Place]
# The name that a stored tensor has among the places; None: it is left out.
Rename = Callable[[str], str | None]


def check(
    directory: pathlib.Path,
    places: Places,
    shapes: Any,
    rename: Rename,
    *,
    supported: str,
    advice: Callable[[set[str]], str],
) -> None:
    """Checks names and shapes of all tensors, before any is read.

    Args:
      directory: contains the files.
      places: the tensors that must be there.
      shapes: tree of the parameters' shapes.
      rename: see `Rename`.
      supported: ends the error for a tensor without a place.
      advice: given the missing names, ends the error for missing tensors.

    Raises:
      ValueError: a tensor has no place or another shape, occurs twice, or is missing.
      OSError: a file is missing.
    """
    missing = set(places)
    for stored, shape in safetensors_files.shapes(directory, _is_used(rename)):
        name = rename(stored)
        if name not in missing:
            raise ValueError(
                f"{directory} holds {stored} "
                + ("twice" if name in places else "which config.json does not describe")
                + f": {supported}"
            )
        expected = places[name].shape(shapes)
        if shape != expected:
            raise ValueError(
                f"{stored} in {directory} has the shape {shape}, but config.json "
                f"implies {expected}: one of the two belongs to another model"
            )
        missing.remove(name)
    if missing:
        first = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"{directory} lacks {len(missing)} tensors ({first}): {advice(missing)}"
        )


def read(
    directory: pathlib.Path, places: Places, shapes: Any, rename: Rename
) -> dict[str, Any]:
    """Reads the tensors that have a place, one at a time, after `check`.

    Args:
      directory: contains the files.
      places: where the tensors belong.
      shapes: tree of the parameters' shapes and dtypes; may be larger than `places`.
      rename: see `Rename`.

    Returns:
      Nested dictionaries of NumPy arrays, not initialised where no tensor belongs.

    Raises:
      ValueError: a tensor is not finite, or a file is damaged.
    """
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    for stored, tensor in safetensors_files.read(directory, _is_used(rename)):
        if not (finite := np.isfinite(tensor)).all():
            raise ValueError(
                f"{stored} in {directory} holds {np.count_nonzero(~finite):,} numbers "
                "that are NaN or infinite: the weights are damaged, or the run that "
                "made them diverged; use others"
            )
        places[rename(stored)].view(params)[...] = tensor
    return params


def _is_used(rename: Rename) -> Callable[[str], bool]:
    return lambda stored: rename(stored) is not None


def save(
    directory: str | os.PathLike[str],
    entries: Mapping[str, Any],
    places: Places,
    shapes: Any,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    files: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Saves a model as a directory that transformers can load.

    Files are renamed into place when all are written, config.json last, so that an
    interrupted export does not look like a model; the next export removes its
    leftovers. At most one file's tensors are in memory beside the parameters.

    Args:
      directory: created if missing. It may contain other files, such as a
        tokenizer's, but no model.
      entries: entries of config.json.
      places: the tensors by name, in the order of writing.
      shapes: tree of the parameters' shapes, and of the dtypes to write.
      params: nested dictionaries of arrays.
      max_shard_bytes: maximum bytes of tensors per file (a larger tensor gets its own
        file); several files come with an index.
      files: more files to copy, such as a tokenizer's.

    Raises:
      ValueError: the parameters do not have these shapes.
      OSError: the directory already contains a model, or cannot be written to.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    _check_params(shapes, params)
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
    copied = [pathlib.Path(file) for file in files]
    for file in copied:
        shutil.copyfile(file, staging / file.name)
    # Zeros broadcast to the real shapes: sizes without the memory.
    hollow = jax.tree.map(
        lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes
    )
    views = {name: place.view(hollow) for name, place in places.items()}
    written = safetensors_files.write(
        staging,
        {name: view.nbytes for name, view in views.items()},
        lambda name: np.ascontiguousarray(places[name].view(params), views[name].dtype),
        max_shard_bytes,
    )
    safetensors_files.write_json(staging / CONFIG_FILE, entries)
    for file in [*(file.name for file in copied), *written, CONFIG_FILE]:
        os.replace(staging / file, directory / file)
    staging.rmdir()


def _check_params(shapes: Any, params: Mapping[str, Any]) -> None:
    def by_name(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    found, expected = by_name(params), by_name(shapes)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the parameter {name} has the shape {found.get(name)}, but the config "
                f"implies {expected.get(name)}: export a model with its own config"
            )
