"""Opened text of a run: batches to train on, and batches held out."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain

from train.data.packing import Batch, Rows
from train.tokenization.tokenizer import Tokenizer

# Opens the tokenizer; its argument trains one, given a vocabulary size.
OpenTokenizer = Callable[[Callable[[int], Tokenizer]], Tokenizer]
# Receives one-line messages for the user.
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Text:
    """Opened text: training part and held-out part.

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
        """Endless batches, in a new order for each epoch.

        The order is that of `seed`, or of the seed that the text was opened with.

        Each batch holds `inputs` and `targets`, int32, and `mask`, bool, of shape
        (rows of this process, length). The mask is False where there is nothing to
        predict. `get_state` returns a JSON value; `set_state` continues exactly from
        there. Call `close` before the program ends.
        """
        return iter(self._train(self._seed if seed is None else seed))

    def epoch(self, batches: grain.DatasetIterator[Batch]) -> float:
        """Passes over the training text so far; complete ones of a streamed dataset."""
        return self._epoch(batches.get_state())

    def held_out_batches(self) -> Iterator[Batch]:
        """Batches of the held-out text, once and in order; see `train_batches`.

        The last batch is padded to the shape of the others.
        """
        return iter(self._held_out)


def describe_held_out(held_out: Rows, tokenizer: Tokenizer) -> str:
    """Size of the held-out text and of the vocabulary, for `Text.description`."""
    return (
        f"{held_out.token_count:,} held out, vocabulary of "
        f"{tokenizer.vocabulary_size:,}"
    )
