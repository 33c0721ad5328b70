"""Added tokens: vocabulary entries in the files beside a tokenizer."""

import pathlib
from collections.abc import Sequence

from models.json_entries import shorten
from train.tokenization import special_tokens


def read(
    directories: Sequence[pathlib.Path], vocabulary: special_tokens.Vocabulary
) -> dict[str, int]:
    """Reads the added tokens that a tokenizer's own file lacks, with their ids.

    Args:
      directories: the first is the tokenizer's own.
      vocabulary: the tokenizer without added tokens.

    Raises:
      ValueError: a file is damaged, or contradicts an id of the tokenizer.
      OSError: a file cannot be read.
    """
    if not directories:
        return {}
    path = directories[0] / special_tokens.ADDED_FILE  # the older of the two formats
    found = {name: (i, path) for name, i in special_tokens.read_json(path).items()}
    path = directories[0] / special_tokens.TOKENIZER_FILE
    key = "added_tokens_decoder"
    added = special_tokens.read_json(path).get(key) or {}
    if not isinstance(added, dict):
        raise ValueError(f"{path}: {key} must be an object, got {shorten(added)}")
    for index, token in added.items():
        name = special_tokens.content(token)
        if not index.isdecimal() or name is None:
            shown = shorten({index: token})
            raise ValueError(f"{path}: {key} must map ids to tokens, got {shown}")
        found[name] = (int(index), path)
    for name, (index, path) in found.items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{path}: {name!r} must have an id, got {shorten(index)}")
        known, other = vocabulary.find(name), vocabulary.name(index)
        if known not in (None, index) or other not in (None, name):
            raise ValueError(
                f"{path} gives {name!r} the id {index}, but the tokenizer has "
                + (f"{other!r} there" if known is None else f"it at {known}")
                + ": one of the two files belongs to another model"
            )
    ids = {name: index for name, (index, _) in found.items()}
    return {name: i for name, i in ids.items() if vocabulary.find(name) is None}
