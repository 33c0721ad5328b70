"""Tokens that the files beside a tokenizer add to its vocabulary."""

import pathlib
from collections.abc import Sequence

from train.tokenization import special_tokens
from train.tokenization.special_tokens import short


def read(
    directories: Sequence[pathlib.Path], vocabulary: special_tokens.Vocabulary
) -> dict[str, int]:
    """Tokens that files beside a tokenizer add to its vocabulary, with their ids.

    Args:
      directories: the tokenizer's own is the first.
      vocabulary: the tokenizer without them.

    Raises:
      ValueError: a file is damaged, or has another id for a token that there is.
      OSError: a file cannot be read.
    """
    if not directories:
        return {}
    path = (
        directories[0] / special_tokens.ADDED_FILE
    )  # as programs wrote it before the other
    found = {name: (i, path) for name, i in special_tokens.read_json(path).items()}
    path = directories[0] / special_tokens.TOKENIZER_FILE
    key = "added_tokens_decoder"
    added = special_tokens.read_json(path).get(key) or {}
    if not isinstance(added, dict):
        raise ValueError(f"{path}: {key} must be an object, got {short(added)}")
    for index, token in added.items():
        name = special_tokens.content(token)
        if not index.isdecimal() or name is None:
            shown = short({index: token})
            raise ValueError(f"{path}: {key} must name tokens by their ids: {shown}")
        found[name] = (int(index), path)
    for name, (index, path) in found.items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{path}: {name!r} must have an id, got {short(index)}")
        known, other = vocabulary.find(name), vocabulary.name(index)
        if known not in (None, index) or other not in (None, name):
            raise ValueError(
                f"{path} gives {name!r} the id {index}, but the tokenizer has "
                + (f"{other!r} there" if known is None else f"it at {known}")
                + ": one of the two is another model's"
            )
    ids = {name: index for name, (index, _) in found.items()}
    return {name: i for name, i in ids.items() if vocabulary.find(name) is None}
