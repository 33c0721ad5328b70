"""Recognises text, JSON and Parquet by content and name; refuses other files."""

import json
import pathlib
import re
from typing import Any, Literal

from train.config.data_config import DataConfig
from train.data.notes import Notes
from train.system.compression import split_name

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonlines", ".jl")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_TABLE_SUFFIXES = (".csv", ".tsv")
_UNPACK = "unpack it"
_REFUSED = {
    "UTF-32": (
        re.compile(rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff"),
        "convert it to UTF-8, e.g. by iconv -f UTF-32 -t UTF-8",
    ),
    "UTF-16": (
        re.compile(rb"\xff\xfe|\xfe\xff|([^\x00]\x00){8}|(\x00[^\x00]){8}"),
        "convert it to UTF-8, e.g. by iconv -f UTF-16 -t UTF-8",
    ),
    "a zip archive": (re.compile(rb"PK\x03\x04|PK\x05\x06"), _UNPACK),
    "a tar archive": (re.compile(rb".{257}ustar", re.DOTALL), _UNPACK),
    "a 7z archive": (re.compile(rb"7z\xbc\xaf\x27\x1c"), _UNPACK),
    "compressed by lz4": (re.compile(rb"\x04\x22\x4d\x18"), _UNPACK),
    "compressed by lzma": (re.compile(rb"\x5d\x00\x00.{2}", re.DOTALL), _UNPACK),
    "compressed by compress": (re.compile(rb"\x1f[\x9d\xa0]"), _UNPACK),
    "a PDF": (re.compile(rb"%PDF-"), "extract its text"),
    "an Arrow file": (re.compile(rb"ARROW1|FEA1"), "convert it to Parquet"),
    "a pointer of Git LFS": (re.compile(rb"version https://git-lfs"), "git lfs pull"),
}


def kind_of(
    path: pathlib.Path,
    start: bytes,
    field: str,
    compression: str | None,
    notes: Notes,
) -> Literal["text", "json", "parquet"]:
    """Format of a file, by its content first and its name second.

    Args:
      path: the file.
      start: the first bytes of its uncompressed content.
      field: field of rows that holds the text.
      compression: compression of the file, or None.
      notes: gets a remark where content and name disagree.

    Raises:
      ValueError: the file holds something that is not read here.
    """
    name, named = split_name(path.name)
    if start.startswith(b"PAR1"):
        if compression:
            raise ValueError(f"{path} is Parquet within {compression}: unpack it")
        return "parquet"
    for what, (form, advice) in _REFUSED.items():
        if form.match(start):
            raise ValueError(
                f"{path} is {what}, not text: {advice}, or leave it out of the pattern"
            )
    if b"\0" in start:
        raise ValueError(f"{path} is binary, not text: leave it out of the pattern")
    if name.suffix in _PARQUET_SUFFIXES:
        raise ValueError(f"{path} is not Parquet, though its name says so")
    if name.suffix in _TABLE_SUFFIXES:
        raise ValueError(
            f"{path} is a table, which only --dataset reads (give its directory); "
            "rename it to .txt to train on it as it is"
        )
    if named != compression:
        form = f"compressed by {compression}" if compression else "not compressed"
        notes.add("files read by their content, not their name", f"{path} is {form}")
    if name.suffix in _JSON_SUFFIXES:
        return "json"
    row = _first_row(start)
    if row is None:
        if field != DataConfig.text_field:
            notes.add(f"files of plain text, without fields such as {field!r}", path)
        return "text"
    if isinstance(row.get(field), str):
        notes.add("files read as JSON, whatever their name", path)
        return "json"
    notes.add(f"files of text that look like JSON without a field {field!r}", path)
    return "text"


def _first_row(start: bytes) -> dict[str, Any] | None:
    """The JSON object at the start of a file, if there is one."""
    text = start.decode("utf-8-sig", "replace").lstrip()
    text = text.removeprefix("[").lstrip()
    if not text.startswith("{"):
        return None
    try:
        row, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return None
    return row if re.match(r"[ \t\r]*(\n|,|\]|$)", text[end:]) else None
