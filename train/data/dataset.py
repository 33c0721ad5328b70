"""The text of a run, opened: its tokenizer, its batches, and what is held out.

Text in files is tokenized once, into a cache on disk; documents of a dataset are
tokenized as they stream by.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import grain

from train.config.rules import flag
from train.config.run_config import DataConfig
from train.data import packing, sources, streams
from train.data.formats import Notes
from train.data.local_text import Corpus
from train.data.packing import Batch, Documents, Rows
from train.data.pieces import split_documents
from train.data.sources import LocalText
from train.data.token_cache import TokenCache
from train.data.token_files import Tokens
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
    weights: pathlib.Path | None = None,
    process_index: int = 0,
    process_count: int = 1,
    report: Report = print,
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
      weights: directory of given weights, see `Tokenizer.open`.
      process_index: which part of the batches to give.
      process_count: number of parts.
      report: told what a user should know, by the first process.

    Raises:
      ValueError: the text is unusable or too short, the tokenizer does not fit it,
        or the batch cannot be split between the processes.
      OSError: a file cannot be read or a dataset not be reached.
    """
    part = _rows_of_process(config.batch_size_sequences, process_index, process_count)
    files = _Files(config, report, is_first=process_index == 0)
    open_tokenizer = functools.partial(
        _open_tokenizer,
        config,
        vocabulary_size,
        tokenizer_directory,
        weights,
    )
    for field, reason in _unused(config).items():
        value = getattr(config, field)
        if value != getattr(DataConfig, field):
            files.report(f"{flag(field)} {value} is not used: {reason}")
    if config.dataset is None:
        return _open_files(config, open_tokenizer, seed, part, files)
    process = (process_index, process_count)
    return _open_stream(config, open_tokenizer, seed, part, process, files)


class _Files:
    """Opens the text of local files, to train on or to evaluate on."""

    def __init__(self, config: DataConfig, report: Report, *, is_first: bool):
        self.report = report if is_first else _ignore
        self._config, self._is_first = config, is_first
        self._cache = TokenCache(config.token_cache_dir, self.report)

    def find(self, pattern: str | None, name: str) -> list[pathlib.Path]:
        """The files that match, after a report of what is left out."""
        notes = Notes()
        paths = sources.find_files(pattern, name, notes)
        for line in notes.lines():
            self.report(f"{name} {pattern!r}: {line}")
        return paths

    def corpus(self, paths: list[pathlib.Path], held_out_fraction: float = 0) -> Corpus:
        config = self._config
        text = LocalText(paths, config.text_field, config.skip_bad_documents)
        return Corpus(text, held_out_fraction)

    def train_tokenizer(self, corpus: Corpus, vocabulary_size: int) -> Tokenizer:
        return corpus.train_tokenizer(vocabulary_size, self._cache)

    def tokens(self, corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
        found = corpus.tokens(tokenizer, self._cache, progress=self._is_first)
        for note in found.notes:
            self.report(note)
        return found

    def evaluation(self, tokenizer: Tokenizer) -> Documents | None:
        """The documents of --eval-glob, if it is given."""
        if self._config.eval_glob is None:
            return None
        paths = self.find(self._config.eval_glob, "--eval-glob")
        return self.tokens(self.corpus(paths), tokenizer).train


def _ignore(message: str) -> None:
    pass


def _unused(config: DataConfig) -> dict[str, str]:
    """Fields that have no meaning beside others, and why."""
    unused = {}
    if config.dataset is None:
        streamed = ("dataset_config", "dataset_split", "shuffle_buffer_documents")
        fields = (*streamed, "dataset_eval_split")
        unused |= dict.fromkeys(fields, "there is no --dataset")
    else:
        unused["held_out_fraction"] = "--dataset has --dataset-eval-split"
    if config.eval_glob is not None:
        fields = ("held_out_fraction", "dataset_eval_split")
        unused |= dict.fromkeys(fields, "--eval-glob is given")
    return unused


def _open_files(
    config: DataConfig,
    open_tokenizer: OpenTokenizer,
    seed: int,
    part: slice,
    files: _Files,
) -> Text:
    paths = files.find(config.data_glob, "--data-glob")
    if config.eval_glob is None:
        corpus = files.corpus(paths, config.held_out_fraction)
    else:
        corpus = files.corpus(_without_evaluation(paths, config, files.report))
    tokenizer = open_tokenizer(functools.partial(files.train_tokenizer, corpus))
    tokens = files.tokens(corpus, tokenizer)
    evaluation = files.evaluation(tokenizer)
    train = packing.all_rows(tokens.train, config)
    held_out = packing.first_rows(
        tokens.held_out if evaluation is None else evaluation, config
    )
    all_tokens = len(tokens.train.tokens)
    if config.packing == "padded" and train.token_count < all_tokens:
        files.report(
            f"--packing padded leaves out {all_tokens - train.token_count:,} of "
            f"{all_tokens:,} tokens to train on: what documents have beyond "
            f"{config.sequence_length_tokens + 1}"
        )
    if len(train) < config.batch_size_sequences or not len(held_out):
        raise ValueError(
            f"the text is too short: with --packing {config.packing} it has "
            f"{len(train)} sequences to train on and {len(held_out)} held out, where a "
            f"batch needs {config.batch_size_sequences} and an evaluation 1; give more "
            "text, a smaller --batch-size-sequences, or another --held-out-fraction"
        )
    return Text(
        tokenizer,
        f"{train.token_count:,} tokens to train on, "
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
    files: _Files,
) -> Text:
    field = config.text_field
    skip = _SkipReport(files.report) if config.skip_bad_documents else None
    train = streams.open_stream(config, config.dataset_split, "--dataset-split")
    if config.eval_glob is None:
        split = config.dataset_eval_split
        other = streams.open_stream(config, split, "--dataset-eval-split")
        if split == config.dataset_split:
            files.report(
                f"--dataset-eval-split {split} is trained on, too: held-out losses are "
                "of text that the model has seen"
            )

    def train_tokenizer(vocabulary_size: int) -> Tokenizer:
        pieces = split_documents(streams.read_stream(train, field, skip))
        return Tokenizer.train((text for text, _ in pieces), vocabulary_size)

    tokenizer = open_tokenizer(train_tokenizer)
    evaluation = files.evaluation(tokenizer)
    if evaluation is None:
        documents = split_documents(streams.read_stream(other, field, skip))
        encoded = packing.encode(tokenizer, documents)
        evaluation = Documents.gather(packing.enough_to_evaluate(encoded, config))
    held_out = packing.first_rows(evaluation, config)
    if not len(held_out):
        where = f"--dataset-eval-split {config.dataset_eval_split}"
        if config.eval_glob is not None:
            where = f"--eval-glob {config.eval_glob!r}"
        raise ValueError(f"{where} has no text to predict")

    def train_batches(seed: int) -> grain.IterDataset[Batch]:
        documents = streams.ShuffledStream(train, config, seed, *process, skip)
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
        f"{held_out.token_count:,} held out, vocabulary of "
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
    weights: pathlib.Path | None,
    train: Callable[[int], Tokenizer],
) -> Tokenizer:
    """The saved tokenizer, else the configured one, else one trained on the text."""
    name, tokenizer = f"--tokenizer {config.tokenizer}", None
    if directory is not None:
        name, tokenizer = f"the one in {directory}", Tokenizer.load(directory)
    elif config.tokenizer is not None:
        tokenizer = Tokenizer.open(config.tokenizer, weights)
    if tokenizer is None:
        tokenizer = train(vocabulary_size)
    tokenizer.mark_documents(begin=config.begins_documents, end=config.ends_documents)
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"the tokenizer ({name}) has {tokenizer.vocabulary_size} tokens, more than "
            f"--vocabulary-size {vocabulary_size}; give that at least "
            f"{tokenizer.vocabulary_size}"
        )
    return tokenizer


def _without_evaluation(
    paths: list[pathlib.Path], config: DataConfig, report: Report
) -> list[pathlib.Path]:
    """The files that are not evaluated on."""
    evaluated = sources.find_files(config.eval_glob, "--eval-glob")
    same = _contents(evaluated)
    contents = zip(paths, _contents(paths), strict=True)
    kept = [path for path, content in contents if content not in same]
    named = f"--data-glob {config.data_glob!r} and --eval-glob {config.eval_glob!r}"
    if not kept:
        raise ValueError(f"{named} match the same files: there are none to train on")
    if left_out := len(paths) - len(kept):
        files = "a file" if left_out == 1 else f"{left_out:,} files"
        report(f"{named} both match {files}, or copies, which are not trained on")
    return kept


def _contents(paths: list[pathlib.Path]) -> list[tuple[int, int]]:
    """Size and checksum of each file, which copies and links share."""
    return [(each["bytes"], each["crc32"]) for each in sources.fingerprint(paths)]


class _SkipReport:
    """Counts documents that are left out, and tells so ever more rarely."""

    def __init__(self, report: Report):
        self._report, self._count = report, 0

    def __call__(self, reason: str) -> None:
        self._count += 1
        if str(self._count).strip("0") == "1":  # 1, 10, 100, ...
            self._report(f"documents skipped so far ({self._count:,}): {reason}, ...")
