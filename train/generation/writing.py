"""Streaming of generated text in complete characters."""

from collections.abc import Collection, Iterator

import jax
import numpy as np

from models import generation, llama
from train.tokenization.tokenizer import Tokenizer

# Decoders return it for bytes that are not a character, or not yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Incremental decoder: text of one token at a time, in complete characters.

    Args:
      tokenizer: decodes the tokens.
      ids: previous tokens, on which the text of the next ones may depend.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(ids)
        # The text of all ids before `known` has been returned; [start:] is decoded.
        self._start, self._known = 0, len(ids)

    def add(self, token: int) -> str:
        """Adds a token; returns the text completed by it, or ""."""
        self._ids.append(token)
        text = self._waiting()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._known = self._known, len(self._ids)
        return text

    def finish(self) -> str:
        """Returns the remaining text without an incomplete character."""
        return self._waiting().rstrip(_INCOMPLETE)

    def _waiting(self) -> str:
        # Text may depend on earlier tokens; decoding all of them would be slow.
        recent = self._ids[self._start :]
        known = self._tokenizer.decode(recent[: self._known - self._start])
        return self._tokenizer.decode(recent)[len(known) :]


def prompt_ids(
    tokenizer: Tokenizer, prompt: str, positions: int, name: str = "the prompt"
) -> list[int]:
    """Encodes a prompt; an empty one becomes the start of a document.

    Raises:
      ValueError: the prompt has more tokens than the model can read.
    """
    ids = tokenizer.prompt(prompt) or [tokenizer.end_of_text]
    check_length(ids, positions, name)
    return ids


def check_length(ids: list[int], positions: int, name: str) -> None:
    """Raises a ValueError for more tokens than the model can read."""
    if len(ids) > positions:
        raise ValueError(
            f"{name} has {len(ids)} tokens, more than the {positions} that the model "
            "is trained to read: shorten it"
        )


def write(
    model: llama.Llama,
    tokenizer: Tokenizer,
    prompt: str,
    keys: jax.Array,
    *,
    length: int,
    sampling: generation.Sampling,
    positions: int,
) -> Iterator[tuple[int, str]]:
    """Continues a prompt until the end of the text, once for each key.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompt: text to continue; empty: a new text.
      keys: (samples,) PRNG keys.
      length: maximum number of tokens to add.
      sampling: temperature, top-k and top-p.
      positions: maximum number of tokens that the model can read.

    Yields:
      (sample, next piece of its text), sample by sample. All samples are drawn at the
      same time; the text of a later one follows when the earlier ones have ended.

    Raises:
      ValueError: the prompt is too long.
    """
    yield from continue_ids(
        model,
        tokenizer,
        prompt_ids(tokenizer, prompt, positions),
        keys,
        length=length,
        sampling=sampling,
        positions=positions,
        stops=tokenizer.stops,
    )


def continue_ids(
    model: llama.Llama,
    tokenizer: Tokenizer,
    ids: list[int],
    keys: jax.Array,
    *,
    length: int,
    sampling: generation.Sampling,
    positions: int,
    stops: Collection[int],
) -> Iterator[tuple[int, str]]:
    """Continues tokens until one of `stops`; see `write`."""
    streams = [TextStream(tokenizer, ids) for _ in range(len(keys))]
    waiting = ["" for _ in streams]
    current = 0
    for tokens in generation.stream(
        model,
        np.array([ids] * len(streams)),
        keys,
        length=length,
        sampling=sampling,
        stops=stops,
        positions=positions,
    ):
        for row, token in enumerate(tokens.tolist()):
            if token != generation.ENDED:
                waiting[row] += streams[row].add(token)
        while tokens[current] == generation.ENDED and current + 1 < len(streams):
            yield current, waiting[current] + streams[current].finish()
            current += 1
        yield current, waiting[current]
        waiting[current] = ""
    for row in range(current, len(streams)):
        yield row, waiting[row] + streams[row].finish()
