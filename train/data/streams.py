"""Streamed datasets of Hugging Face, shuffled in windows and resumed exactly."""

import contextlib
import itertools
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from train.config.data_config import DataConfig
from train.data.formats import get_text

if TYPE_CHECKING:
    import datasets

# Called with the reason for which a row is left out.
OnSkip = Callable[[str], None]


def open_stream(
    config: DataConfig, split: str, flag: str
) -> "datasets.IterableDataset":
    """Opens one split of `config.dataset` without downloading all of it.

    Args:
      config: names the dataset.
      split: the split.
      flag: the command line's name for the split, for messages.

    Raises:
      ValueError: there is no such split or configuration, no text in the rows, or the
        datasets package is missing.
      OSError: there is no such dataset, or it cannot be reached.
    """
    named = f"--dataset {config.dataset}"
    if config.dataset_config is not None:
        named += f" --dataset-config {config.dataset_config}"
    named += f" {flag} {split}"
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{named} needs the package datasets: pip install datasets"
        ) from error
    first = None
    try:
        stream = datasets.load_dataset(
            config.dataset, config.dataset_config, split=split, streaming=True
        )
        if config.skip_bad_documents:  # the first row may be bad
            first = dict.fromkeys(stream.column_names or [config.text_field])
        else:
            with contextlib.closing(iter(stream)) as rows:
                first = next(rows, None)
    except StopIteration:  # raised by datasets for files without rows
        first = None
    except Exception as error:  # whatever the reading library raises
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot open {named}: {' '.join(str(error).split())}") from error
    if first is None:
        raise ValueError(f"{named} is empty")
    get_text(first, config.text_field, named)
    # Reads only the text's column.
    return stream.select_columns([config.text_field])


def read_stream(
    stream: "datasets.IterableDataset", text_field: str, skip: OnSkip | None = None
) -> Generator[str]:
    """Reads the documents of a stream, without blank ones.

    Args:
      stream: the rows.
      text_field: field that holds the text.
      skip: called with the reason for skipping a row, or the rest of a file that
        cannot be parsed. None: a bad row is an error.

    Raises:
      OSError: a row cannot be read.
    """
    rows = iter(stream)
    try:
        for number in itertools.count():
            where = f"row {number} of the dataset"
            try:
                row = next(rows, None)
            except Exception as error:  # whatever the reading library raises
                message = f"cannot read {where}: {' '.join(str(error).split())}"
                # Network errors are OSErrors, and may be gone the next time.
                is_bad = skip is not None and not isinstance(error, OSError)
                if not is_bad or not _go_to_next_file(stream):
                    raise OSError(message) from error
                skip(message + "; nor is the rest of its file read")
                rows = iter(stream)
                continue
            if row is None:
                return
            try:
                text = get_text(row, text_field, "it")
            except ValueError as error:
                if skip is None:
                    raise OSError(f"cannot read {where}: {error}") from error
                skip(f"cannot read {where}: {error}")
                continue
            if text.strip():
                yield text
    finally:
        rows.close()


def _go_to_next_file(stream: "datasets.IterableDataset") -> bool:
    """Moves a stream to its next file; False if that is not possible."""
    state = inner = stream.state_dict()
    while isinstance(inner.get("examples_iterable"), dict):
        inner = inner["examples_iterable"]
        if "previous_state" in inner:  # examples come in batches: reads none of them
            inner.update(
                previous_state=None,
                batch_idx=0,
                num_chunks_since_previous_state=0,
                cropped_chunk_length=0,
            )
    if "shard_idx" not in inner:
        return False
    inner.update(shard_idx=inner["shard_idx"] + 1, shard_example_idx=0)
    stream.load_state_dict(state)
    return True


class ShuffledStream(grain.IterDataset[str]):
    """Endless documents of a stream, reshuffled in each epoch.

    The files of the dataset are shuffled, then the documents within windows. Of n
    processes each reads its own files where their number can be divided by n, else
    every n-th document. `skip` is that of `read_stream`.
    """

    def __init__(
        self,
        stream: "datasets.IterableDataset",
        config: DataConfig,
        seed: int,
        process_index: int,
        process_count: int,
        skip: OnSkip | None = None,
    ):
        super().__init__()
        self.skip = skip
        self.text_field = config.text_field
        self.window_documents = config.shuffle_buffer_documents
        self.seed = seed
        self._stream = stream
        self._process = {"rank": process_index, "world_size": process_count}

    def split_for_process(self) -> "datasets.IterableDataset":
        """A new stream of the documents of this process."""
        from datasets import distributed

        return distributed.split_dataset_by_node(self._stream, **self._process)

    def __iter__(self) -> grain.DatasetIterator[str]:
        return _ShuffledStreamIterator(self)


class _ShuffledStreamIterator(grain.DatasetIterator[str]):
    """Shuffles documents window by window, and resumes within a window.

    The state holds the position of the stream where the window begins, from which it is
    read again: the window itself is too large for a checkpoint.

    Not grain's WindowShuffleIterDataset (0.2.18): its windows mix two epochs, window k
    of seed s has the order of window k - 1 of seed s + 1, seeds near 2^32 fail, and
    after a network error it yields the started window unshuffled, in an order that a
    resumed run would not have.
    """

    def __init__(self, dataset: ShuffledStream):
        super().__init__()
        self._dataset = dataset
        self._reader: Generator[str] | None = None
        self.set_state({"epoch": 0, "window": 0, "window_start": None, "taken": 0})

    def get_state(self) -> dict[str, Any]:
        return dict(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        self._close_reader()
        self._state = dict(state)
        self._window: list[str] = []

    def __next__(self) -> str:
        if self._reader is None:
            self._open_reader()
            self._read_window()
        if self._state["taken"] == len(self._window):
            self._go_to_next_window()
        text = self._window[self._state["taken"]]
        self._state["taken"] += 1
        return text

    def close(self) -> None:
        super().close()
        self._close_reader()

    def _go_to_next_window(self) -> None:
        epoch, window = self._state["epoch"], self._state["window"]
        start = self._stream.state_dict()
        self._state.update(window=window + 1, window_start=start, taken=0)
        self._read_window()
        if not self._window:
            self._state.update(epoch=epoch + 1, window=0, window_start=None)
            self._open_reader()
            self._read_window()
        if not self._window:
            raise OSError("the dataset has no text for this process; use fewer of them")

    def _read_window(self) -> None:
        try:
            window = list(
                itertools.islice(self._reader, self._dataset.window_documents)
            )
        except OSError:
            self._close_reader()  # the next call starts the window again
            raise
        key = (self._dataset.seed, self._state["epoch"], self._state["window"])
        order = np.random.default_rng(key).permutation(len(window))
        self._window = [window[i] for i in order]

    def _open_reader(self) -> None:
        self._close_reader()
        dataset, epoch = self._dataset, self._state["epoch"]
        # A new object, as the old one keeps its position in the next epoch.
        self._stream = dataset.split_for_process()
        # datasets shuffles the files by this number, and does not for 0.
        order = np.random.SeedSequence((dataset.seed, epoch)).generate_state(1)
        self._stream.set_epoch(1 + int(order[0]))
        if self._state["window_start"] is not None:
            self._stream.load_state_dict(self._state["window_start"])
        self._reader = read_stream(self._stream, dataset.text_field, dataset.skip)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
