"""Text that a model writes, as it comes."""

from collections.abc import Iterator

import jax
import numpy as np

from models import generation, llama
from train.tokenization.tokenizer import Tokenizer

# Decoders put it for bytes that are not, or not yet, a character.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Text of tokens that come one by one, in whole characters.

    Args:
      tokenizer: decodes the tokens.
      ids: tokens whose text is known, on which that of the next ones may depend.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self._tokenizer = tokenizer
        self._ids = list(ids)
        # The text of [start:known] has been given away, and that of all before.
        self._start, self._known = 0, len(ids)

    def add(self, token: int) -> str:
        """The text that a token adds, with what was waiting for it; maybe nothing."""
        self._ids.append(token)
        text = self._waiting()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._known = self._known, len(self._ids)
        return text

    def finish(self) -> str:
        """The text still waiting, without the beginning of a character."""
        return self._waiting().rstrip(_INCOMPLETE)

    def _waiting(self) -> str:
        # Some tokens' text depends on the ones before; all of them would be slow.
        recent = self._ids[self._start :]
        known = self._tokenizer.decode(recent[: self._known - self._start])
        return self._tokenizer.decode(recent)[len(known) :]


def prompt_ids(
    tokenizer: Tokenizer, prompt: str, positions: int, name: str = "the prompt"
) -> list[int]:
    """The tokens of a prompt; of an empty one, those before a text's first token.

    Raises:
      ValueError: the model cannot read so many.
    """
    ids = tokenizer.prompt(prompt) or [tokenizer.end_of_text]
    if len(ids) > positions:
        raise ValueError(
            f"{name} has {len(ids)} tokens, more than the {positions} that the model "
            "is trained to read: shorten it"
        )
    return ids


def write(
    model: llama.Llama,
    tokenizer: Tokenizer,
    prompt: str,
    keys: jax.Array,
    *,
    length: int,
    sampling: generation.Sampling,
    positions: int,
) -> Iterator[list[str | None]]:
    """Continues a prompt to the end of a text, once for each key.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      prompt: text to continue; empty: a new text.
      keys: (samples,) PRNG keys.
      length: most tokens to add.
      sampling: how they are drawn.
      positions: most tokens that the model reads.

    Yields:
      (sample, text it goes on with), one sample after the other. The first comes as it
      is drawn, and the others, drawn at the same time, as soon as those before end.

    Raises:
      ValueError: the prompt is too long.
    """
    ids = prompt_ids(tokenizer, prompt, positions)
    streams = [TextStream(tokenizer, ids) for _ in range(len(keys))]
    waiting = ["" for _ in streams]
    current = 0
    for tokens in generation.stream(
        model,
        np.array([ids] * len(streams)),
        keys,
        length=length,
        sampling=sampling,
        stops=tokenizer.stops,
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
