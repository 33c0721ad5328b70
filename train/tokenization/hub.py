"""Download of tokenizers from Hugging Face's hub, or from its local cache."""

import logging
import pathlib
import re
from collections.abc import Iterable, Sequence

import huggingface_hub
from huggingface_hub import errors

# Files of a model: its config, weights and tokenizer.
_MODEL_FILES = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json"),
    *("special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("tokenizer.model", "generation_config.json", "chat_template.jinja"),
    "added_tokens.json",
)
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download_tokenizer(
    name: str, choices: Sequence[str], beside: Iterable[str]
) -> pathlib.Path:
    """Downloads a tokenizer's file and returns its path.

    Args:
      name: the repository.
      choices: possible names of the file; the first that exists is downloaded.
      beside: further files, downloaded into the same directory if they exist.

    Raises:
      OSError: there is no such repository or file, or the hub cannot be reached.
    """
    if not _NAME.fullmatch(name) or name.endswith((".json", ".model")):
        raise FileNotFoundError(
            f"--tokenizer {name}: no such file or directory; give a tokenizer.json, "
            "a SentencePiece .model or the name of a repository on the hub"
        )
    for choice in choices:
        try:
            path = _download(name, choice)
        except errors.LocalEntryNotFoundError as error:
            raise OSError(
                f"--tokenizer {name}: no such file or directory, and the hub cannot be "
                "reached to look for a repository of that name"
            ) from error
        if path is not None:
            for file in beside:
                try:
                    _download(name, file)
                except errors.LocalEntryNotFoundError:  # not in the cache either
                    continue
            return path
    raise FileNotFoundError(f"--tokenizer {name} holds neither {' nor '.join(choices)}")


def _download(name: str, file: str) -> pathlib.Path | None:
    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(name, file))
    except errors.LocalEntryNotFoundError:
        raise
    except errors.EntryNotFoundError:
        return None
    except (OSError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"--tokenizer {name}: {reason}") from error


def download_model(name: str) -> pathlib.Path:
    """Downloads a model's files and returns their directory.

    Raises:
      OSError: there is no such repository, or the hub cannot be reached.
    """
    if not _NAME.fullmatch(name):
        raise FileNotFoundError(
            f"--init-from {name}: no such directory; give one with config.json, "
            "model.safetensors and tokenizer.json, or the name of a repository on the "
            "hub"
        )
    # Each attempt to reach the hub would be a line of its own.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(_MODEL_FILES))
        )
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"--init-from {name}: no such directory, and the hub cannot be reached to "
            "look for a repository of that name"
        ) from error
    except (OSError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"--init-from {name}: {reason}") from error
