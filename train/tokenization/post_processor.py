"""The `post_processor` of a tokenizer.json: special tokens put around texts."""

from typing import Any

import tokenizers


def first_added(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Id of the token that a post-processor puts before texts, or None."""
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    word = tokenizers.Tokenizer(model).encode("a")
    processed = tokenizer.post_process(word)
    return processed.ids[0] if processed.special_tokens_mask[0] else None


def replaced(
    found: dict[str, Any] | None, begin: tuple[str, int] | None
) -> dict[str, Any] | None:
    """Builds the post-processor that puts a begin token before texts.

    Args:
      found: the previous entry; only its ByteLevel parts, which set offsets, are kept.
      begin: the token and its id; None: no begin token.
    """
    parts = [found] if found else []
    if parts and parts[0]["type"] == "Sequence":
        parts = parts[0]["processors"]
    parts = [part for part in parts if part["type"] == "ByteLevel"]
    if begin is not None:
        name, index = begin

        def piece(text: str, type_id: int) -> list[dict[str, Any]]:
            return [
                {"SpecialToken": {"id": name, "type_id": type_id}},
                {"Sequence": {"id": text, "type_id": type_id}},
            ]

        token = {"id": name, "ids": [index], "tokens": [name]}
        parts.append(
            {
                "type": "TemplateProcessing",
                "single": piece("A", 0),
                "pair": piece("A", 0) + piece("B", 1),
                "special_tokens": {name: token},
            }
        )
    if len(parts) > 1:
        return {"type": "Sequence", "processors": parts}
    return parts[0] if parts else None
