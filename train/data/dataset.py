"""Opens the text of a run: its tokenizer, its batches and the held-out text.

Text in files is tokenized once, into a cache on disk; documents of a dataset are
tokenized as they stream by.
"""

import functools
import pathlib
from collections.abc import Callable

from train.config.data_config import DataConfig
from train.config.rules import flag
from train.data.file_text import Files, open_file_text
from train.data.packing import Batch
from train.data.streamed_text import open_streamed_text
from train.data.text import Report, Text
from train.tokenization.tokenizer import Tokenizer

__all__ = ["Batch", "Text", "open_text"]


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
      report: called by the first process with messages for the user.

    Raises:
      ValueError: the text is unusable or too short, the tokenizer does not fit it,
        or the batch cannot be split between the processes.
      OSError: a file cannot be read or a dataset not be reached.
    """
    part = _rows_of_process(config.batch_size_sequences, process_index, process_count)
    files = Files(config, report, is_first=process_index == 0)
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
        return open_file_text(config, open_tokenizer, seed, part, files)
    process = (process_index, process_count)
    return open_streamed_text(config, open_tokenizer, seed, part, process, files)


def _unused(config: DataConfig) -> dict[str, str]:
    """Fields that other fields make meaningless, with the reason."""
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


def _rows_of_process(rows: int, process_index: int, process_count: int) -> slice:
    """Rows of each batch for one of several processes."""
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
