"""Text sources: patterns, order, links; everything skipped is reported."""

import gzip
import json
import os
import pathlib
import shutil

import pytest

from train.data import sources
from train.data.notes import Notes
from train.data.sources import LocalText


def read(pattern, field="text", skip_bad=False, notes=None):
    """Documents, joined from their pieces."""
    texts, text = [], ""
    local = LocalText(sources.find_files(str(pattern)), field, skip_bad)
    for piece, ends in local.pieces(notes):
        text += piece
        if ends:
            texts.append(text)
            text = ""
    assert not text
    return texts


def test_text_files_are_documents_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_bytes(b"third\nlines\n")
    (tmp_path / "a.txt").write_text("Überall 🐋")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"second"))
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "empty.txt").write_text("")
    notes = Notes()
    texts = read(tmp_path / "**" / "*.txt*", notes=notes)
    assert texts == ["Überall 🐋", "second", "third\nlines\n"]
    (line,) = notes.lines()
    assert line == f"files without text (2): {tmp_path}/blank.txt, ..."
    assert read(tmp_path / ".hidden.txt") == ["hidden"]


def test_embedded_text_is_moby_dick():
    pieces = list(LocalText(sources.find_files(None)).pieces())
    assert "Call me Ishmael." in pieces[0][0][:100]
    assert len("".join(text for text, _ in pieces).encode()) == 1_204_996


@pytest.mark.parametrize("size", [1, 2**16, 2**16 + 1, 2**18])
def test_a_fingerprint_tells_other_bytes_at_both_ends_and_other_sizes(tmp_path, size):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * size)
    (before,) = sources.fingerprint([path])
    assert (before["name"], before["bytes"]) == ("a.txt", size)
    moved = path.rename(tmp_path / "moved")
    assert sources.fingerprint([moved])[0]["crc32"] == before["crc32"]
    for position in {0, size - 1}:
        data = bytearray(b"a" * size)
        data[position] = 0
        path.write_bytes(data)
        assert sources.fingerprint([path])[0]["crc32"] != before["crc32"]


@pytest.mark.parametrize(
    ("files", "pattern", "found"),
    [
        (["[2024] a.txt"], "[2024] a.txt", ["[2024] a.txt"]),
        (["x [v2]/1.txt", "x [v2]/2.txt"], "x [v2]/[1-9].txt", ["1.txt", "2.txt"]),
        (["b/x [v2].txt", "b/x v.txt"], "*/x [v2].txt", ["x v.txt"]),
        (["b/x [v2].txt"], "*/x [v2].txt", ["x [v2].txt"]),
        (["a*.txt", "ab.txt"], "a*.txt", ["a*.txt"]),
        (["a?b.txt"], "a?b.txt", ["a?b.txt"]),
    ],
)
def test_names_are_taken_as_they_are_written(tmp_path, files, pattern, found):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    paths = sources.find_files(str(tmp_path / pattern))
    assert [path.name for path in paths] == found


def test_links_lead_to_each_file_once(tmp_path):
    for name in ("texts/b/2.txt", "texts/a.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    texts = tmp_path / "texts"
    for name, target in (
        *(("up", ".."), ("self", "."), ("self2", "."), ("b/loop", "..")),
        *(("away", "../elsewhere"), ("again.txt", "a.txt"), ("lost.txt", "nowhere")),
    ):
        (texts / name).symlink_to(target)

    def find(pattern):
        notes = Notes()
        paths = sources.find_files(str(texts / pattern), notes=notes)
        return [str(path.relative_to(texts)) for path in paths], notes.counts

    links = {
        "broken links, pipes and devices that are left out": 1,
        "further names of the same files, left out": 1,
    }
    for pattern in ("**/*.txt", "**", "**/**/*.t?t"):
        assert find(pattern) == (["a.txt", "away/c.txt", "b/2.txt"], links)
    assert find("*/*.txt")[0] == ["away/c.txt", "b/2.txt", "self/a.txt"]
    directories = {"directories that match, but not the files in them": 5}
    assert find("*.t*") == (["a.txt"], links)
    assert find("*") == (["a.txt"], links | directories)
    for path in texts.rglob("*.txt"):
        path.unlink()  # empty; following links would not end
    with pytest.raises(ValueError, match=r"is a directory: .*texts/\*\*/\*.txt' mat"):
        sources.find_files(str(texts))
    (texts / "lost.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"no file matches .*; broken links.*lost.txt"):
        sources.find_files(str(texts / "*.txt"))


def test_home_is_found_and_users_that_do_not_exist_are_no_crash(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.find_files("~/*.txt") == [tmp_path / "a.txt"]
    with pytest.raises(ValueError, match="no file matches"):
        sources.find_files("~no-such-user/*.txt")


def test_patterns_without_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("texts/x.txt").mkdir(parents=True)
    pathlib.Path("texts/b").mkdir()
    for name in ("a.jsonl.gz", "b.jsonl.gz", "README.md"):
        pathlib.Path("texts/b", name).touch()
    os.mkfifo("pipe")
    pathlib.Path("broken.txt").symlink_to("nowhere")
    for pattern, message in (
        ("*.md", r"no file matches --eval-glob '\*.md'"),
        ("broken.txt", "no file matches"),
        (
            "texts",
            r"'texts' is a directory: 'texts/\*\*/\*.jsonl.gz' matches the files",
        ),
        ("texts/", r"is a directory: 'texts/\*\*/\*.jsonl.gz'"),
        ("texts/*.txt", r"only directories: 'texts/x.txt/\*\*/\*.txt' matches"),
        ("texts/*", r"only directories: 'texts/b/\*\*/\*.jsonl.gz' matches"),
        ("pipe", "'pipe' is a pipe or a device.*write it to a file"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.find_files(pattern, "--eval-glob")


def test_bad_documents_are_skipped_and_counted(tmp_path):
    rows = [{"text": "one"}, {"body": "two"}, {"text": 3}, ["four"], {"text": "five"}]
    lines = [json.dumps(row) for row in rows]
    lines.insert(1, '{"text": "cut')
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.txt").write_bytes(b"good text, " * 10**6 + b"\xff")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"damaged" * 10**6)[:-9])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n')[:-9])
    (tmp_path / "e.json").write_text('[{"text": "six"}, {"text": "seven"}, {"te')
    (tmp_path / "f.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "g.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "h.txt").write_text("eight")
    shutil.copy(tmp_path / "h.txt", tmp_path / "i.txt")
    (tmp_path / "i.txt").chmod(0)
    readable = ["eight"] if os.access(tmp_path / "i.txt", os.R_OK) else []  # by root
    notes = Notes()
    texts = read(tmp_path / "*", skip_bad=True, notes=notes)
    assert texts == ["one", "five", "six", "seven", "eight", *readable]
    assert notes.counts["documents skipped"] == 11 - len(readable)
    assert notes.examples["documents skipped"].startswith(
        f"{tmp_path}/a.jsonl:2 is not JSON: "
    )
