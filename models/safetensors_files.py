"""Safetensors files, single or sharded with an index, and JSON files beside them."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = ("F32", "F16", "BF16")

# Whether a tensor is of interest, by its name.
Wanted = Callable[[str], bool]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      ValueError: the file does not contain a JSON object.
      OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must contain a JSON object, got {str(values)[:40]!r}")
    return values


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes an indented JSON object; an OSError names the file."""
    try:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:  # a full disk's error has no file name
        raise OSError(error.errno, error.strerror, str(path)) from error


def shapes(
    directory: pathlib.Path, wanted: Wanted = lambda name: True
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of tensors; arguments and errors: see `read`."""
    for name, tensors in _tensors(directory, wanted):
        yield name, tuple(tensors.get_slice(name).get_shape())


def read(
    directory: pathlib.Path, wanted: Wanted = lambda name: True
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads tensors lazily, one at a time, with their names.

    Args:
      directory: contains `SINGLE_FILE`, or `INDEX_FILE` and the files that it lists.
      wanted: tensors for which it returns False are left out, whatever their dtype.

    Yields:
      Name and tensor: float32, float16, or ml_dtypes' bfloat16.

    Raises:
      ValueError: there is no safetensors file, one is damaged, or a tensor has an
        unsupported dtype.
      OSError: a file that the index lists is missing.
    """
    for name, tensors in _tensors(directory, wanted):
        yield name, tensors.get_tensor(name)


def _tensors(directory: pathlib.Path, wanted: Wanted) -> Iterator[tuple[str, Any]]:
    """Yields each wanted tensor's name with the open file that contains it."""
    for file in _files(directory):
        path = directory / file
        try:
            with safetensors.safe_open(path, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118, not a dictionary
                    if not wanted(name):
                        continue
                    dtype = tensors.get_slice(name).get_dtype()
                    if dtype not in _DTYPES:
                        raise ValueError(
                            f"{name} in {path} has the dtype {dtype}: convert the "
                            f"model to one of {', '.join(_DTYPES)}"
                        )
                    yield name, tensors
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or incomplete ({error}): download it again"
            ) from error


def _files(directory: pathlib.Path) -> list[str]:
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    path = directory / INDEX_FILE
    if not path.is_file():
        raise ValueError(
            f"{directory} contains neither {SINGLE_FILE} nor {INDEX_FILE}: save the "
            "model with safetensors, other formats are not supported"
        )
    files = read_json(path).get("weight_map")
    if not files:
        raise ValueError(f"{path} has no weight_map: download it again")
    names = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: weight_map must map each tensor's name to a file")
    return sorted(set(names))


def write(
    directory: pathlib.Path,
    sizes_bytes: Mapping[str, int],
    tensor: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> list[str]:
    """Writes tensors to one or more files, with one file's tensors in memory at a time.

    Args:
      directory: an existing directory.
      sizes_bytes: the size of each tensor by name, in the order of writing.
      tensor: returns the tensor of a name, contiguous.
      max_shard_bytes: maximum bytes of tensors per file; a larger tensor gets its own
        file.

    Returns:
      The names of the files; the index, if there is one, comes last.

    Raises:
      OSError: a file could not be written.
    """
    shards, free_bytes = [], 0
    for name, size in sizes_bytes.items():
        if not shards or size > free_bytes:
            shards.append([])
            free_bytes = max_shard_bytes
        shards[-1].append(name)
        free_bytes -= size

    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [SINGLE_FILE]
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, {name: tensor(name) for name in names})
    if count == 1:
        return files
    file_of = {
        name: file for file, names in zip(files, shards, strict=True) for name in names
    }
    metadata = {"total_size": sum(sizes_bytes.values())}
    write_json(directory / INDEX_FILE, {"metadata": metadata, "weight_map": file_of})
    return [*files, INDEX_FILE]


def _write_file(path: os.PathLike[str], tensors: dict[str, np.ndarray]) -> None:
    try:
        # transformers 4 refuses files without this entry.
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise OSError(f"cannot write {path}: {error}") from error
