"""Text of a dataset of Hugging Face, tokenized as its documents stream by."""

from typing import Any

import grain

from train.config.data_config import DataConfig
from train.data import encoding, packing, streams
from train.data.encoding import Documents
from train.data.file_text import Files
from train.data.packing import Batch
from train.data.pieces import split_documents
from train.data.streamed_rows import streamed_batches
from train.data.text import OpenTokenizer, Report, Text, describe_held_out
from train.tokenization.tokenizer import Tokenizer


def open_streamed_text(
    config: DataConfig,
    open_tokenizer: OpenTokenizer,
    seed: int,
    part: slice,
    process: tuple[int, int],
    files: Files,
) -> Text:
    """Opens the text of `--dataset`; see `dataset.open_text`.

    Args:
      config: which text, and how to cut it.
      open_tokenizer: opens the tokenizer, or trains one.
      seed: decides the order of the documents.
      part: rows of each batch for this process.
      process: index and number of processes.
      files: opens `--eval-glob`, and reports.
    """
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
        encoded = encoding.encode(tokenizer, documents)
        evaluation = Documents.gather(packing.enough_to_evaluate(encoded, config))
    held_out = packing.first_rows(evaluation, config)
    if not len(held_out):
        where = f"--dataset-eval-split {config.dataset_eval_split}"
        if config.eval_glob is not None:
            where = f"--eval-glob {config.eval_glob!r}"
        raise ValueError(f"{where} has no text to predict")

    def train_batches(seed: int) -> grain.IterDataset[Batch]:
        documents = streams.ShuffledStream(train, config, seed, *process, skip)
        return streamed_batches(documents, tokenizer, config, part)

    return Text(
        tokenizer,
        f"{config.dataset}, split {config.dataset_split}, streamed; "
        + describe_held_out(held_out, tokenizer),
        seed,
        train_batches,
        packing.ordered_batches(held_out, config, part),
        _epoch_of_stream,
    )


def _epoch_of_stream(state: dict[str, Any]) -> float:
    """The epoch in the innermost state, that of the `ShuffledStream`."""
    while "epoch" not in state:
        state = state["documents" if "documents" in state else "parent"]
    return state["epoch"]


class _SkipReport:
    """Counts skipped documents and reports the first, tenth, hundredth and so on."""

    def __init__(self, report: Report):
        self._report, self._count = report, 0

    def __call__(self, reason: str) -> None:
        self._count += 1
        if str(self._count).strip("0") == "1":  # 1, 10, 100, ...
            self._report(f"documents skipped so far ({self._count:,}): {reason}, ...")
