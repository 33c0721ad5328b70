"""Opened text of a run: batches to train on, and batches held out."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain

from train.data.packing import Batch, Rows
from train.tokenization.tokenizer import Tokenizer

# Given what trains one of a vocabulary, should there be none yet.
OpenTokenizer = Callable[[Callable[[int], Tokenizer]], Tokenizer]
# Told what a user should know, in a line.
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text to train on and text held out, opened.

    Attributes:
      tokenizer: the tokenizer of both.
      description: the sizes, in one line.
    """

    tokenizer: Tokenizer
    description: str
    _seed: int
    _train: Callable[[int], grain.IterDataset[Batch]]
    _held_out: grain.IterDataset[Batch]
    _epoch: Callable[[dict[str, Any]], float]  # given the state of train batches

    def train_batches(self, seed: int | None = None) -> grain.DatasetIterator[Batch]:
        """Batches without end, each epoch in an order of its own.

        The order is that of `seed`, or of the seed that the text was opened with.

        Each batch holds `inputs` and `targets`, int32, and `mask`, bool, of shape
        (rows of this process, length). The mask is False where there is nothing to
        predict. `get_state` gives what JSON can hold; after `set_state` the batches go
        on exactly as they would have. `close` the iterator before the program ends.
        """
        return iter(self._train(self._seed if seed is None else seed))

    def epoch(self, batches: grain.DatasetIterator[Batch]) -> float:
        """Passes over the training text so far; complete ones of a streamed dataset."""
        return self._epoch(batches.get_state())

    def held_out_batches(self) -> Iterator[Batch]:
        """The held-out text, once and in order; see `train_batches`.

        The last batch is padded to the shape of the others.
        """
        return iter(self._held_out)


def describe_held_out(held_out: Rows, tokenizer: Tokenizer) -> str:
    """Size of the held-out text and of the vocabulary, for `Text.description`."""
    return (
        f"{held_out.token_count:,} held out, vocabulary of "
        f"{tokenizer.vocabulary_size:,}"
    )
