"""Text formats give the same documents; files that are not text are refused."""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import random

import pyarrow
import pytest
from pyarrow import parquet

from train.data import formats
from train.data.notes import Notes
from train.data.pieces import PIECE_CHARACTERS, split_documents
from train.system import compression

TEXTS = ["one\ntwo", "Überall Wasser 🐋", 'a "quoted" {text}, [and], more\\']
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)


def zstd(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path, field="text", notes=None):
    """Documents of a file; raises errors among them."""
    texts = []
    for document in formats.read_file(path, field, notes or Notes()):
        if isinstance(document, ValueError):
            raise document
        texts.append(document if isinstance(document, str) else "".join(document))
    return texts


def write(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read(tmp_path, suffix):
    notes = Notes()
    path = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix]("Überall".encode()))
    assert read(path, notes=notes) == ["Überall"]
    assert not notes.lines()
    data = path.read_bytes()
    if suffix:
        write(path, data + COMPRESS[suffix](b" Wasser"))  # as by pigz and cat
        assert read(path) == ["Überall Wasser"]
        for damaged in (data[:-3], data + b"X" + data[1:], data + data[:-3]):
            with pytest.raises(OSError, match=rf"cannot read .*a.txt{suffix}: "):
                read(write(path, damaged))
        if suffix != ".zst":  # zero padding, as on tapes and block devices
            assert read(write(path, data + bytes(500) + data)) == ["ÜberallÜberall"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json", "c4.00-of-01.Json", "a.jl"]
)
def test_json_lines_are_documents(tmp_path, name, suffix):
    path = write(tmp_path / (name + suffix), COMPRESS[suffix](LINES.encode()))
    assert read(path) == TEXTS


FORMS = {
    "an array": json.dumps([{"text": text} for text in TEXTS]),
    "an indented array": json.dumps([{"text": text} for text in TEXTS], indent=1),
    "objects in many lines": "".join(
        json.dumps({"text": t}, indent=2) + "\n" for t in TEXTS
    ),
    "blank lines": LINES.replace("\n", "\n\n \n"),
    "CRLF": LINES.replace("\n", "\r\n"),
    "no last newline": LINES.strip(),
    "a byte-order mark": "\ufeff" + LINES,
    "an array with one": "\ufeff" + json.dumps([{"text": text} for text in TEXTS]),
    "NaN": json.dumps([{"text": text, "score": float("nan")} for text in TEXTS]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [7, 2**20])
def test_forms_of_json(tmp_path, monkeypatch, form, block):
    """Values may cross the boundaries of the blocks that are read."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", block)
    assert read(write(tmp_path / "a.json", FORMS[form])) == TEXTS
    # Detected by content, too.
    notes = Notes()
    assert read(write(tmp_path / "a.txt", FORMS[form]), notes=notes) == TEXTS
    assert "files read as JSON, whatever their name (1): " in notes.lines()[0]


def test_an_object_is_one_document(tmp_path):
    for indent in (None, 2):
        text = json.dumps({"text": "whole", "more": [1]}, indent=indent)
        assert read(write(tmp_path / "a.json", text)) == ["whole"]


def test_rows_without_text_are_blank_and_halves_of_characters_replaced(tmp_path):
    lines = '{"body": null}\n{"body": " "}\n{"body": "half \\ud83d"}\n'
    path = write(tmp_path / "a.jsonl", lines)
    assert read(path, "body") == ["", " ", "half \ufffd"]


def test_parquet(tmp_path):
    table = pyarrow.table({"id": range(4), "text": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == [*TEXTS, ""]
    path = write(tmp_path / "data", (tmp_path / "a.parquet").read_bytes())
    assert read(path) == [*TEXTS, ""]


def test_line_ends_are_made_one_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 4)  # between the two of a line end
    notes = Notes()
    path = write(tmp_path / "a.txt", "\ufeffone\r\ntwo\r\nü\n🐋")
    assert read(path, notes=notes) == ["one\ntwo\nü\n🐋"]
    (line,) = notes.lines()
    assert "line ends, CRLF or CR, are read as LF (1): " in line and str(path) in line


def test_names_that_lie_are_said(tmp_path):
    for name, data, text in (
        ("a.txt.gz", b"plain", "plain"),
        ("b.txt", gzip.compress(b"packed", mtime=0), "packed"),
        ("c.txt.gz", zstd(b"otherwise"), "otherwise"),
        ("d.json.gz", b'{"text": "rows"}', "rows"),
    ):
        notes = Notes()
        assert read(write(tmp_path / name, data), notes=notes) == [text]
        assert notes.lines()[0].startswith("files read by their content, not their n")
    notes = Notes()
    path = write(tmp_path / "e.txt", '{"body": "x"}\n{"body": "y"}\n')
    assert read(path, notes=notes) == ['{"body": "x"}\n{"body": "y"}\n']
    assert "look like JSON without a field 'text'" in notes.lines()[0]
    notes = Notes()
    path = write(tmp_path / "f.txt", "plain")
    assert read(path, "body", notes=notes) == ["plain"]
    assert notes.lines()[0].startswith("files of plain text, without fields such as 'b")


@pytest.mark.parametrize(
    "text",
    ["{", "{x: 1}", "{}{}", '{"text": "a"} is an object', "[1] A note", "[", "{}"],
)
def test_text_with_brackets_is_text(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == [text]


def tar(text):
    return b"name".ljust(257, b"\0") + b"ustar\x0000" + text


BAD_FILES = [
    ("a.txt", b"ab\xff", r"a.txt is not UTF-8 text: byte 0xff at position 2; convert"),
    ("a.txt", b"\xef\xbb\xbfab\xff", "byte 0xff at position 5;"),
    ("a.txt", "ab€".encode()[:-1], "byte 0xe2 at position 2;"),
    ("a.txt", "text".encode("utf-16"), "a.txt is UTF-16, not text: convert.*iconv"),
    ("a.txt", "ab".encode("utf-32"), "a.txt is UTF-32, not text: convert.*iconv"),
    ("a.txt", "long enough".encode("utf-16-le"), "a.txt is UTF-16, not text"),
    ("a.txt", "long enough".encode("utf-16-be"), "a.txt is UTF-16, not text"),
    ("a.jsonl", LINES.encode("utf-16"), "a.jsonl is UTF-16, not text"),
    ("a.txt", b"\x00\x01\x02", "a.txt is binary, not text: leave it out"),
    ("a.txt", b"text" + bytes(9), "a.txt is binary, not text"),
    ("a.docx", b"PK\x03\x04...", "a zip archive, not text: unpack it, or leave it out"),
    (
        "a.tar.gz",
        gzip.compress(tar(b"text"), mtime=0),
        "a tar archive, not text: unpack it",
    ),
    ("a.txt.lzma", lzma.compress(b"text", lzma.FORMAT_ALONE), "compressed by lzma, n"),
    ("a.txt.Z", b"\x1f\x9d\x90\x74\xca", "compressed by compress, not text: unpack it"),
    ("a.txt", b"%PDF-1.7 ...", "a PDF, not text: extract its text, or leave it out"),
    ("a.arrow", b"ARROW1\0\0", "an Arrow file, not text: convert it to Parquet"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1", "Git LFS, not .*lfs pull"),
    ("a.csv", b"id,text\n1,x\n", "a.csv is a table, which only --dataset reads"),
    ("a.tsv.gz", gzip.compress(b"id\ttext\n", mtime=0), "a.tsv.gz is a table"),
    ("a.parquet", b"text", "a.parquet is not Parquet, though its name says so"),
    ("a.json", b"[1]", r"a.json, item 1 is no JSON object: 1"),
    ("a.json", b"text", r"a.json:1 is not JSON: Expecting value"),
    ("a.json", b'[{"text": "a"},', r"a.json, item 2 is not JSON: the array has no end"),
    ("a.json", b'[{"text": "a"}, {"te', r"a.json, item 2 is not JSON: Unterminated"),
    ("a.json", b'[{"text": "a"} {]', r"a.json, item 2 is not JSON: Expecting prop"),
    (
        "a.json",
        b'{"data": [\n{"text": "a"}]}',
        "item 1 has no field 'text', only 'data'",
    ),
    ("a.jsonl", b'{"text": "a"}\n\n{"te', "a.jsonl:3 is not JSON: "),
    ("a.jsonl", b'{"text": "a"}\n[1]', r"a.jsonl:2 is no JSON object: \[1\]"),
    ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1 is not UTF-8.* 10;"),
    ("a.jsonl", b'{"a": 1, "b": 2}', "'text', only 'a', 'b'; .*--text-field"),
    ("a.jsonl", b'{"text": ["a"]}', "a.jsonl:1: .* list; .*--text-field"),
    ("a.jsonl", b"[" * 10**5, "is not JSON"),
    ("a.jsonl", b'{"a":' * 10**5 + b"1}", "is not JSON"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES))
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(write(tmp_path / name, content))
    assert "\n" not in str(raised.value)


def test_damaged_parquet_is_refused(tmp_path):
    table = pyarrow.table({"text": [str(i) for i in range(9999)], "n": range(9999)})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"no field 'body', only 'text', 'n'; .*--te"):
        read(tmp_path / "a.parquet", "body")
    with pytest.raises(ValueError, match=r"row 1: field 'n' holds no text but int"):
        read(tmp_path / "a.parquet", "n")
    for damaged in (data[:1000], data[:1000] + bytes(2000) + data[3000:]):
        with pytest.raises(OSError, match=r"cannot read .*a.parquet: "):
            read(write(tmp_path / "a.parquet", damaged))
    with pytest.raises(ValueError, match="is Parquet within gzip: unpack it"):
        read(write(tmp_path / "a.parquet.gz", gzip.compress(data)))


def test_a_bad_byte_is_named_by_its_position_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 5)
    for start in (codecs.BOM_UTF8, b""):
        for count in range(12):
            data = start + "ü🐋a".encode() * count
            with pytest.raises(ValueError, match=f"0xff at position {len(data)};"):
                read(write(tmp_path / "a.txt", data + b"\xff..."))


def test_pieces_do_not_depend_on_blocks():
    rng = random.Random(0)
    for size in (0, 1, 2**17 - 1, 2**17, 2**17 + 1, 400_000):
        text = "".join(rng.choices("ab \n", [20, 20, 3, 1], k=size))
        cuts = [0, *sorted(rng.choices(range(size + 1), k=9)), size]
        blocks = [text[a:b] for a, b in itertools.pairwise(cuts)]
        pieces = list(split_documents([text]))
        assert list(split_documents([iter(blocks)])) == pieces
        assert "".join(piece for piece, _ in pieces) == text
        assert max(len(piece) for piece, _ in pieces) <= PIECE_CHARACTERS


def test_compression_by_name():
    assert compression.split_name("A.JSON.GZ")[0].name == "a.json"
    assert compression.split_name("a.json") == (
        compression.split_name("a.json")[0],
        None,
    )
