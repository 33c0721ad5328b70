"""Reads the rows of a file: JSON (lines or arrays), CSV, TSV, Parquet."""

import csv
import io
import pathlib
from typing import Any, NamedTuple

from train.data.formats import SNIFFED_BYTES, read_json, row_of
from train.system.compression import find_compression, open_bytes, split_name

_FORMS = ".jsonl, .json, .csv, .tsv or .parquet"
_LONGEST_CELL = 2**31 - 1
Row = dict[str, Any]


class Table(NamedTuple):
    """Rows of a file or a dataset's split.

    Attributes:
      rows: the rows, with the same fields.
      class_names: names of the classes that numbers stand for, by field, where the
        data has them.
    """

    rows: list[Row]
    class_names: dict[str, tuple[str, ...]]


def read_rows(path: pathlib.Path, named: str) -> Table:
    """Reads all rows of a file.

    Args:
      path: the file; all but Parquet may be compressed.
      named: the flag and its value, for messages.

    Raises:
      ValueError: it is of no known form, or a row cannot be read.
      OSError: the file cannot be read.
    """
    if path.is_dir():
        raise ValueError(f"{named} is a directory: give a file, or --dataset {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{named}: there is no such file")
    suffix = split_name(path.name)[0].suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return Table(_read_table(path, suffix), {})
    if suffix in (".jsonl", ".ndjson", ".json"):
        return Table(_read_json(path), {})
    raise ValueError(f"{named} is of no known form: rows are read from {_FORMS}")


def _read_json(path: pathlib.Path) -> list[Row]:
    compression = find_compression(path)
    with open_bytes(path, compression) as file:
        start = file.read(SNIFFED_BYTES)
    rows = []
    for row in read_json(path, compression, start, row_of):
        if isinstance(row, ValueError):
            raise ValueError(f"{row}; the {len(rows):,} rows before it can be read")
        rows.append(row)
    return rows


def _read_table(path: pathlib.Path, suffix: str) -> list[Row]:
    form: dict[str, Any] = {"strict": True}
    if suffix == ".tsv":  # of GLUE: quotes are text
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    csv.field_size_limit(_LONGEST_CELL)
    rows: list[Row] = []
    readable = lambda: f"the {len(rows):,} rows before it can be read"
    with open_bytes(path, find_compression(path)) as file:
        reader = csv.DictReader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), **form
        )
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}, has another number of cells "
                        f"than the {len(reader.fieldnames or ())} of the first line; "
                        f"{readable()}"
                    )
                rows.append(row)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}; {readable()}"
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x}; "
                f"convert it; {readable()}"
            ) from error
    return rows


def _read_parquet(path: pathlib.Path) -> Table:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        features = datasets.Features.from_arrow_schema(table.schema)
        return Table(table.to_pylist(), class_names(features))
    except (pyarrow.ArrowException, OSError) as error:
        raise OSError(f"cannot read {path}: {error}") from error


def class_names(features: Any) -> dict[str, tuple[str, ...]]:
    """Names of classes by field, from the `features` of a Hugging Face dataset."""
    import datasets

    return {
        name: tuple(feature.names)
        for name, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
