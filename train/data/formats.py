"""Reads the documents of a file: plain text, JSON (lines or arrays), Parquet."""

import codecs
import functools
import io
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from train.data.file_kinds import kind_of
from train.data.notes import Notes
from train.system.compression import (
    BLOCK_BYTES,
    find_compression,
    open_bytes,
)

SNIFFED_BYTES = 2**20
PARQUET_ROWS = 256

# A text, the blocks of a long text, or the error in its place.
Document = str | Iterator[str] | ValueError
# Makes something of a JSON value, given where it is.
Convert = Callable[[Any, str], Any]

_SEPARATORS = re.compile(r"[\s,]*")


def read_file(path: pathlib.Path, field: str, notes: Notes) -> Iterator[Document]:
    """Reads the documents of a file; consume blocks before the next document.

    Text is one document, JSON and Parquet have one in each row.

    Args:
      path: the file, plain or compressed.
      field: field of rows that holds the text.
      notes: gets a remark where content and name disagree.

    Raises:
      ValueError: the file holds no text in a form that is read here.
      OSError: it cannot be read.
    """
    compression = find_compression(path)
    with open_bytes(path, compression) as file:
        start = file.read(SNIFFED_BYTES)
    kind = kind_of(path, start, field, compression, notes)
    if kind == "text":
        yield _decode_blocks(path, compression, notes)
    elif kind == "parquet":
        yield from _read_parquet(path, field)
    else:
        convert = functools.partial(_text_of, field=field)
        yield from read_json(path, compression, start, convert)


def read_json(
    path: pathlib.Path, compression: str | None, start: bytes, convert: Convert
) -> Iterator[Any]:
    """Reads the values of JSON lines, of an array, or one after the other.

    Args:
      path: the file.
      compression: compression of the file, or None.
      start: the first bytes of its content.
      convert: makes an item of each value.

    Yields:
      The items, and a ValueError in the place of each one that is not JSON.
    """
    read = _read_lines if _is_in_lines(start) else _read_values
    yield from read(path, compression, convert)


def get_text(row: dict[str, Any], field: str, where: str) -> str:
    """The text of a row of a dataset; None counts as empty.

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


def _is_in_lines(start: bytes) -> bool:
    """Whether JSON has one row per line, and is not an array or indented."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    first, newline, _ = text.partition(b"\n")
    is_indented = newline and first.rstrip().endswith((b"{", b"[", b","))
    return not text.startswith(b"[") and not is_indented


def _decode_blocks(
    path: pathlib.Path, compression: str | None, notes: Notes
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    position = 0
    with open_bytes(path, compression) as file:
        while True:
            data = file.read(BLOCK_BYTES)
            position += len(data)
            try:
                text = newlines.decode(data, final=not data)
            except UnicodeDecodeError as error:
                bad = position - len(error.object) + error.start
                raise _not_utf8(str(path), error, bad) from error
            if text:
                yield text
            if not data:
                break
    if newlines.newlines not in ("\n", None):
        notes.add("files whose line ends, CRLF or CR, are read as LF", path)


def _not_utf8(where: str, error: UnicodeDecodeError, position: int) -> ValueError:
    byte = error.object[error.start]
    return ValueError(
        f"{where} is not UTF-8 text: byte {byte:#04x} at position {position}; "
        "convert it, or leave it out of the pattern"
    )


def _read_lines(
    path: pathlib.Path, compression: str | None, convert: Convert
) -> Iterator[Any]:
    with open_bytes(path, compression) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                text = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
                text = text.decode()
                if text.strip():
                    yield convert(json.loads(text), where)
            except UnicodeDecodeError as error:
                yield _not_utf8(where, error, error.start)
            except (json.JSONDecodeError, RecursionError) as error:
                yield ValueError(f"{where} is not JSON: {error}")


def _read_values(
    path: pathlib.Path, compression: str | None, convert: Convert
) -> Iterator[Any]:
    number = 1
    try:
        for value in _parse(_decode_blocks(path, compression, Notes())):
            yield convert(value, f"{path}, item {number}")
            number += 1
    except (json.JSONDecodeError, RecursionError) as error:
        message = getattr(error, "msg", str(error))
        yield ValueError(f"{path}, item {number} is not JSON: {message}")


def _parse(blocks: Iterator[str]) -> Iterator[Any]:
    """Parses items of arrays, or consecutive values, in bounded memory.

    Raises:
      json.JSONDecodeError: there is something else, or an array has no end.
    """
    decoder = json.JSONDecoder()
    text, at, inside = "", 0, False
    while True:
        at = _SEPARATORS.match(text, at).end()
        if at == len(text):
            text, at = next(blocks, ""), 0
            if not text:
                break
        elif text[at] == "[" and not inside:
            inside, at = True, at + 1
        elif text[at] == "]" and inside:
            inside, at = False, at + 1
        else:
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # A value cut off at the end of the block fails near the end.
                if error.pos < len(text) - 20 and "Unterminated" not in error.msg:
                    raise
                # Doubles the text, so that long values are parsed a few times only.
                more = "".join(itertools.islice(blocks, 1 + len(text) // BLOCK_BYTES))
                if not more:
                    raise
                text, at = text[at:] + more, 0
            else:
                yield value
    if inside:
        raise json.JSONDecodeError("the array has no end", text, at)


def row_of(value: Any, where: str) -> dict[str, Any] | ValueError:
    """The value if it is a JSON object, else an error."""
    if isinstance(value, dict):
        return value
    return ValueError(f"{where} is no JSON object: {json.dumps(value)[:40]}")


def _text_of(value: Any, where: str, field: str) -> str | ValueError:
    row = row_of(value, where)
    if isinstance(row, ValueError):
        return row
    try:
        return valid_text(get_text(row, field, where))
    except ValueError as error:
        return error


def valid_text(text: str) -> str:
    """Text without lone surrogates, which JSON can encode and tokenizers refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_parquet(path: pathlib.Path, field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        # With a buffer, columns are read in pieces and not one row group at once.
        with parquet.ParquetFile(path, buffer_size=BLOCK_BYTES) as file:
            get_text(dict.fromkeys(file.schema_arrow.names), field, str(path))
            values = itertools.chain.from_iterable(
                batch.column(0)
                for batch in file.iter_batches(PARQUET_ROWS, None, [field])
            )
            for number, value in enumerate(values, 1):
                where = f"{path}, row {number}"
                try:
                    yield get_text({field: value.as_py()}, field, where)
                except UnicodeDecodeError as error:
                    yield _not_utf8(where, error, error.start)
                except ValueError as error:
                    yield error
    except (pyarrow.ArrowException, OSError) as error:
        raise OSError(f"cannot read {path}: {error}") from error
