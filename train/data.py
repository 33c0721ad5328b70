"""The text of a run, opened: its tokenizer, its batches, and what is held out.

Text in files is tokenized once and kept in memory; documents of a dataset are
tokenized as they stream by.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain

from train import packing, sources
from train.config import DataConfig
from train.packing import Batch, Rows
from train.tokenizer import Piece, Tokenizer, split_documents

# Given the text to train one on, should there be none yet.
OpenTokenizer = Callable[[Iterator[Piece]], Tokenizer]


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
        """Passes over the training text so far; whole ones of a streamed dataset."""
        return self._epoch(batches.get_state())

    def held_out_batches(self) -> Iterator[Batch]:
        """The held-out text, once and in order; see `train_batches`.

        The last batch is padded to the shape of the others.
        """
        return iter(self._held_out)


def open_text(
    config: DataConfig,
    vocabulary_size: int,
    *,
    seed: int,
    tokenizer_directory: pathlib.Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Text:
    """Opens the text, and opens or trains its tokenizer.

    Every process of a run must see the same files, and calls this with its own index.
    Rows of files and held-out rows do not depend on the number of processes; of a
    streamed dataset each process shuffles and packs its own part.

    Args:
      config: which text, how to cut it, and how much of it to hold out.
      vocabulary_size: the model's: tokens that a tokenizer may have.
      seed: decides the order of the rows, alone.
      tokenizer_directory: a run's directory; the tokenizer saved there, if any, is
        used instead of `config.tokenizer`.
      process_index: which part of the batches to give.
      process_count: number of parts.

    Raises:
      ValueError: the text is unusable or too short, the tokenizer does not fit it,
        or the batch cannot be split between the processes.
      OSError: a file cannot be read or a dataset not be reached.
    """
    part = _rows_of_process(config.batch_size_sequences, process_index, process_count)
    open_tokenizer = functools.partial(
        _open_tokenizer, config, vocabulary_size, tokenizer_directory
    )
    if config.dataset is None:
        return _open_files(config, open_tokenizer, seed, part)
    process = (process_index, process_count)
    return _open_stream(config, open_tokenizer, seed, part, process)


def _open_files(
    config: DataConfig, open_tokenizer: OpenTokenizer, seed: int, part: slice
) -> Text:
    paths = sources.find_files(config.data_glob)

    # Read anew for each use: the text may be too much to hold it beside its tokens.
    def documents() -> Iterator[str]:
        return sources.read_documents(paths, config.text_field)

    characters = sum(map(len, documents()))
    if not characters:
        raise ValueError(f"no text in {', '.join(map(str, paths[:3]))}")
    split = round(characters * (1 - config.held_out_fraction))

    def pieces(start: int, stop: int) -> Iterator[Piece]:
        return _between(split_documents(documents()), start, stop)

    tokenizer = open_tokenizer(pieces(0, split))
    train = packing.all_rows(packing.encode(tokenizer, pieces(0, split)), config)
    held_out = packing.first_rows(
        packing.encode(tokenizer, pieces(split, characters)), config
    )
    if len(train) < config.batch_size_sequences or not len(held_out):
        raise ValueError(
            f"the text is too short: with --packing {config.packing} it has "
            f"{len(train)} sequences to train on and {len(held_out)} held out, where a "
            f"batch needs {config.batch_size_sequences} and an evaluation 1; give more "
            "text, or a smaller --batch-size-sequences"
        )
    return Text(
        tokenizer,
        f"{len(train.tokens):,} tokens to train on, "
        + _describe_rest(held_out, tokenizer),
        seed,
        lambda seed: packing.shuffled_batches(train, config, seed, part),
        packing.ordered_batches(held_out, config, part),
        lambda state: state["next_index"] * config.batch_size_sequences / len(train),
    )


def _open_stream(
    config: DataConfig,
    open_tokenizer: OpenTokenizer,
    seed: int,
    part: slice,
    process: tuple[int, int],
) -> Text:
    field = config.text_field
    train = sources.open_stream(config, config.dataset_split, "--dataset-split")
    other = sources.open_stream(
        config, config.dataset_eval_split, "--dataset-eval-split"
    )
    tokenizer = open_tokenizer(split_documents(sources.read_stream(train, field)))
    held_out = packing.first_rows(
        packing.encode(tokenizer, split_documents(sources.read_stream(other, field))),
        config,
    )
    if not len(held_out):
        raise ValueError(
            f"--dataset-eval-split {config.dataset_eval_split} has no text to predict"
        )

    def train_batches(seed: int) -> grain.IterDataset[Batch]:
        documents = sources.ShuffledStream(train, config, seed, *process)
        return packing.streamed_batches(documents, tokenizer, config, part)

    return Text(
        tokenizer,
        f"{config.dataset}, split {config.dataset_split}, streamed; "
        + _describe_rest(held_out, tokenizer),
        seed,
        train_batches,
        packing.ordered_batches(held_out, config, part),
        _epoch_of_stream,
    )


def _epoch_of_stream(state: dict[str, Any]) -> float:
    """The epoch in the state of a `ShuffledStream` that others are built on."""
    while "epoch" not in state:
        state = state["documents" if "documents" in state else "parent"]
    return state["epoch"]


def _describe_rest(held_out: Rows, tokenizer: Tokenizer) -> str:
    return (
        f"{len(held_out.tokens):,} held out, vocabulary of "
        f"{tokenizer.vocabulary_size:,}"
    )


def _rows_of_process(rows: int, process_index: int, process_count: int) -> slice:
    if rows % process_count:
        raise ValueError(
            f"--batch-size-sequences {rows} cannot be shared evenly by {process_count} "
            f"processes; use a multiple of {process_count}"
        )
    share = rows // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _open_tokenizer(
    config: DataConfig,
    vocabulary_size: int,
    directory: pathlib.Path | None,
    pieces: Iterator[Piece],
) -> Tokenizer:
    """The saved tokenizer, else the configured one, else one trained on the text."""
    name, tokenizer = f"--tokenizer {config.tokenizer}", None
    if directory is not None:
        with contextlib.suppress(FileNotFoundError):
            name, tokenizer = f"the one in {directory}", Tokenizer.load(directory)
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = Tokenizer.open(config.tokenizer)
    if tokenizer is None:
        tokenizer = Tokenizer.train((text for text, _ in pieces), vocabulary_size)
    tokenizer.mark_documents(begin=config.bos or config.bos_and_eos, end=not config.bos)
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"the tokenizer ({name}) has {tokenizer.vocabulary_size} tokens, more than "
            f"--vocabulary-size {vocabulary_size}; give that at least "
            f"{tokenizer.vocabulary_size}"
        )
    return tokenizer


def _between(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The pieces between two positions in the joined text, cut where need be."""
    position = 0
    for text, ends in pieces:
        first, last = max(start - position, 0), min(stop - position, len(text))
        if first < last:
            yield text[first:last], ends and last == len(text)
        position += len(text)
        if position >= stop:
            return
