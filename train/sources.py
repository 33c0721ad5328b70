"""Where documents come from: local files, or a stream of the datasets library."""

import contextlib
import glob
import gzip
import io
import itertools
import json
import pathlib
import zlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import grain
import numpy as np

from train.config import DataConfig

if TYPE_CHECKING:
    import datasets

EMBEDDED_TEXT = pathlib.Path(__file__).parent / "corpus" / "moby-dick.txt.gz"
FINGERPRINT_BLOCK_BYTES = 2**16


def find_files(pattern: str | None) -> list[pathlib.Path]:
    """The files that match, sorted; the text that comes with the project for None.

    Raises:
      ValueError: no file matches.
    """
    if pattern is None:
        return [EMBEDDED_TEXT]
    expanded = str(pathlib.Path(pattern).expanduser())
    found = map(pathlib.Path, glob.glob(expanded, recursive=True))
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise ValueError(
            f"no file matches --data-glob {pattern!r}; check it, and put it in quotes"
        )
    return paths


def fingerprint(paths: list[pathlib.Path]) -> list[dict[str, Any]]:
    """Name, size and checksum of each file, without reading all of it.

    The checksum covers the first and the last 64 KiB. Directories are left out, so
    that files which were moved together keep their fingerprint.

    Example:
      >>> fingerprint([EMBEDDED_TEXT])
      [{'name': 'moby-dick.txt.gz', 'bytes': 486697, 'crc32': 2591207979}]

    Raises:
      OSError: a file cannot be read.
    """
    return [_fingerprint_of_file(path) for path in paths]


def _fingerprint_of_file(path: pathlib.Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            first = file.read(FINGERPRINT_BLOCK_BYTES)
            size = file.seek(0, io.SEEK_END)
            file.seek(max(len(first), size - FINGERPRINT_BLOCK_BYTES))
            checksum = zlib.crc32(file.read(), zlib.crc32(first))
    except OSError as error:
        raise OSError(f"cannot read {path}: {error}") from error
    return {"name": path.name, "bytes": size, "crc32": checksum}


def read_documents(paths: list[pathlib.Path], text_field: str) -> Iterator[str]:
    """Reads the files one after the other, and leaves out blank documents.

    Args:
      paths: UTF-8 text, plain or .gz: a document each, or a document in each line
        where the name ends in .jsonl or .jsonl.gz.
      text_field: field of the lines' JSON objects that holds the text.

    Raises:
      ValueError: a file is not UTF-8, or a line no JSON object with that field.
      OSError: a file cannot be read.
    """
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rb") as file:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    documents = _read_lines(file, path, text_field)
                else:
                    documents = iter([_decode(file.read(), str(path))])
                yield from (text for text in documents if text.strip())
        except (OSError, EOFError, zlib.error) as error:
            raise OSError(f"cannot read {path}: {error}") from error


def _read_lines(file: BinaryIO, path: pathlib.Path, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object: {text.strip()[:40]}")
        # Escapes can spell halves of characters, which UTF-8 and tokenizers refuse.
        halves = get_text(row, field, where).encode("utf-16", "surrogatepass")
        yield halves.decode("utf-16", "replace")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text: byte {data[error.start]:#04x} at position "
            f"{error.start}; convert it, or leave it out of --data-glob"
        ) from error


def get_text(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a row of a dataset; none counts as empty.

    Raises:
      ValueError: the row has no such field, or it is no text.
    """
    if field not in row:
        raise ValueError(
            f"{where} has no field {field!r}, only {', '.join(map(repr, row))}; "
            "name the one with the text by --text-field"
        )
    text = row[field]
    if not isinstance(text, str | None):
        raise ValueError(
            f"{where}: field {field!r} holds no text but {type(text).__name__}; "
            "name the one with the text by --text-field"
        )
    return text or ""


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
    try:
        stream = datasets.load_dataset(
            config.dataset, config.dataset_config, split=split, streaming=True
        )
        with contextlib.closing(iter(stream)) as rows:
            first = next(rows, None)
    except (ValueError, RuntimeError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"cannot open {named}: {' '.join(str(error).split())}") from error
    if first is None:
        raise ValueError(f"{named} is empty")
    get_text(first, config.text_field, named)
    # The other fields need not be read.
    return stream.select_columns([config.text_field])


def read_stream(stream: "datasets.IterableDataset", text_field: str) -> Generator[str]:
    """The documents of a stream, blank ones left out.

    Raises:
      OSError: a row cannot be read.
    """
    with contextlib.closing(iter(stream)) as rows:
        for number in itertools.count():
            try:
                row = next(rows, None)
                if row is None:
                    return
                text = get_text(row, text_field, "it")
            except Exception as error:  # of any of the libraries that read the formats
                message = " ".join(str(error).split())
                raise OSError(
                    f"cannot read row {number} of the dataset: {message}"
                ) from error
            if text.strip():
                yield text


class ShuffledStream(grain.IterDataset[str]):
    """The documents of a stream without end, in an order of its own in each epoch.

    The files of the dataset are shuffled, then the documents within windows. Of n
    processes each reads its own files where their number can be divided by n, else
    every n-th document.
    """

    def __init__(
        self,
        stream: "datasets.IterableDataset",
        config: DataConfig,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        super().__init__()
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
    """Reads a window, shuffles it, gives its documents out, and reads the next.

    A stream can tell its position, but a shuffled window is too much to write into a
    checkpoint: the state holds the position where the window begins, from which it is
    read again.
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
            self._close_reader()  # asked again, it begins the window again
            raise
        key = (self._dataset.seed, self._state["epoch"], self._state["window"])
        order = np.random.default_rng(key).permutation(len(window))
        self._window = [window[i] for i in order]

    def _open_reader(self) -> None:
        self._close_reader()
        dataset, epoch = self._dataset, self._state["epoch"]
        # A new object: where the old one is must not leak into a new epoch.
        self._stream = dataset.split_for_process()
        # The library orders the files by this number, and leaves them alone for 0.
        order = np.random.SeedSequence((dataset.seed, epoch)).generate_state(1)
        self._stream.set_epoch(1 + int(order[0]))
        if self._state["window_start"] is not None:
            self._stream.load_state_dict(self._state["window_start"])
        self._reader = read_stream(self._stream, dataset.text_field)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
