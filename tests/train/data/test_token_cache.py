"""Token cache: reuse, cleaning, damaged files."""

import json
import os
import resource
import threading
import time

import numpy as np
import pytest

from train.data import token_files
from train.data.token_cache import TokenCache
from train.tokenization.tokenizer import Tokenizer

PARTS = [
    (False, [1, 2, 3], True),
    (False, [4], False),
    (False, [5, 6], True),
    (False, [7], False),  # truncated
    (True, [8, 9], True),
    (True, [10], True),
]


class Builder:
    """Makes tokens and counts the calls."""

    def __init__(self, parts=PARTS, dtype=np.uint16):
        self.count, self._parts, self._dtype = 0, parts, dtype

    def __call__(self, notes):
        self.count += 1
        for is_held_out, values, ends in self._parts:
            yield is_held_out, np.array(values, self._dtype), ends
        notes.append("a note")


@pytest.fixture
def reports():
    return []


@pytest.fixture
def cache(tmp_path, reports):
    return TokenCache(str(tmp_path / "cache"), reports.append)


def check(tokens):
    assert tokens.train.tokens[:].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert tokens.train.ends[:].tolist() == [3, 6, 7]
    assert tokens.held_out.tokens[:].tolist() == [8, 9, 10]
    assert tokens.held_out.ends[:].tolist() == [2, 3]
    assert tokens.notes == ["a note"]


@pytest.mark.parametrize("chunk", [2, 2**20])
def test_tokens_are_made_once_and_read_from_files(cache, reports, monkeypatch, chunk):
    monkeypatch.setattr(token_files, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(token_files, "CHUNK_DOCUMENTS", chunk)
    build = Builder(dtype=np.uint32)
    for _ in range(3):
        tokens = cache.tokens({"text": 1}, build)
        check(tokens)
        assert tokens.train.tokens[2:4].dtype == np.uint32
        assert tokens.train.tokens[2:4].tolist() == [3, 4]
        assert isinstance(tokens.train.tokens, token_files.ArrayInFile)
    assert build.count == 1
    check(cache.tokens({"text": 2}, build))
    assert build.count == 2 and not reports


def test_a_text_without_tokens(cache):
    for _ in range(2):
        tokens = cache.tokens(1, Builder([]))
        assert len(tokens.train.tokens) == len(tokens.held_out.ends) == 0
        tokens = cache.tokens(2, Builder(PARTS[-2:]))
        assert tokens.train.ends[:].tolist() == []
        assert tokens.held_out.ends[:].tolist() == [2, 3]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda entry: os.truncate(entry / "tokens", 8),
    "longer": lambda entry: (entry / "tokens").open("ab").write(b"12"),
    "a flipped bit": lambda entry: flip(entry / "tokens"),
    "one in the ends": lambda entry: flip(entry / "ends"),
    "one in the description": lambda entry: flip(entry / "about.json"),
    "no description": lambda entry: (entry / "about.json").unlink(),
    "an empty one": lambda entry: (entry / "about.json").write_text(""),
    "another one": lambda entry: (entry / "about.json").write_text('["content"]'),
    "no tokens": lambda entry: (entry / "tokens").unlink(),
    "an empty directory": lambda entry: [file.unlink() for file in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_made_anew(cache, reports, tmp_path, damage):
    build = Builder()
    cache.tokens(1, build)
    (entry,) = (tmp_path / "cache").glob("[!.]*")
    DAMAGE[damage](entry)
    for _ in range(2):
        check(cache.tokens(1, build))
    assert build.count == 2
    assert len(reports) == 1 and "is damaged, and made anew: " in reports[0]


def test_a_tokenizer_is_trained_once(cache, reports, tmp_path):
    trained = []

    def train():
        trained.append(Tokenizer.train(["call me ishmael"] * 9, 280))
        return trained[-1]

    first = cache.tokenizer(1, train)
    again = cache.tokenizer(1, train)
    assert again.encode("ishmael") == first.encode("ishmael")
    assert len(trained) == 1 and not reports
    path = next((tmp_path / "cache").glob("*/tokenizer.json"))
    path.write_text(path.read_text().replace('"merges": [', '"merges": [ '))
    cache.tokenizer(1, train)
    assert len(trained) == 2 and "the tokenizer is not what was wr" in reports[0]
    cache.tokenizer(1, train)
    cache.tokenizer(2, train)
    assert len(trained) == 3 and len(reports) == 1


def test_processes_that_start_at_once_wait_for_the_first(tmp_path, cache):
    build, reports, found = Builder(), [], []
    began, goes_on = threading.Event(), threading.Event()

    def slowly(notes):
        began.set()
        goes_on.wait(60)
        yield from build(notes)

    def ask(build):
        found.append(
            TokenCache(str(tmp_path / "cache"), reports.append).tokens(1, build)
        )

    threads = [threading.Thread(target=ask, args=[slowly])]
    threads += [threading.Thread(target=ask, args=[build]) for _ in range(2)]
    threads[0].start()
    assert began.wait(60)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 60
    while len(reports) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not found
    goes_on.set()
    for thread in threads:
        thread.join(60)
    for tokens in found:
        check(tokens)
    assert len(found) == 3 and build.count == 1
    assert all("waiting for another process" in line for line in reports)


def test_what_was_left_unfinished_is_removed(cache, reports, tmp_path):
    def fail(notes):
        yield False, np.array([1], np.uint16), True
        raise OSError("cannot read the text")

    with pytest.raises(OSError, match="cannot read the text"):
        cache.tokens(1, fail)
    left = tmp_path / "cache" / f".{'0' * 32}.partial"
    left.mkdir()
    (left / "tokens").write_bytes(b"12")
    other = tmp_path / "cache" / ".config.partial"  # another program's
    other.mkdir()
    check(cache.tokens(1, Builder()))
    assert other.exists() and not left.exists()
    assert not reports


def test_what_was_not_used_for_long_is_removed(cache, tmp_path):
    long_ago = time.time() - 61 * 24 * 3600
    directory = tmp_path / "cache"
    for identity in (1, 2):
        cache.tokens(identity, Builder())
    old = list(directory.glob("[!.]*"))
    (directory / "mine").mkdir()
    for path in [*old, directory / "mine"]:
        os.utime(path, (long_ago, long_ago))
    build = Builder()
    cache.tokens(2, build)  # used again
    cache.tokens(3, build)
    assert build.count == 1 and (directory / "mine").exists()
    assert len(list(directory.glob("[!.]*"))) == 3
    cache.tokens(1, build)
    assert build.count == 2


def test_without_a_place_to_write_tokens_are_in_memory(cache, reports, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    build = Builder()
    for _ in range(2):
        check(cache.tokens(1, build))
    assert build.count == 2
    assert len(reports) == 1 and "tokens cannot be kept in" in reports[0]


@pytest.mark.parametrize("room_bytes", [0, 3, 10, 40, 60])
def test_a_full_disk_is_no_error(cache, reports, tmp_path, monkeypatch, room_bytes):
    """At any point of writing; a limit on file sizes stands in for the full disk."""
    monkeypatch.setattr(token_files, "CHUNK_TOKENS", 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
    try:
        tokens = cache.tokens(1, Builder())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    check(tokens)
    assert len(reports) == 1 and "tokens cannot be kept in" in reports[0]
    assert not list((tmp_path / "cache").glob("[!.]*"))
    assert not list((tmp_path / "cache").glob("*.partial"))
    check(cache.tokens(1, Builder()))


def test_tokens_that_are_read_only_are_used(cache, reports, tmp_path):
    cache.tokens(1, Builder())
    description = next((tmp_path / "cache").glob("*/about.json"))
    assert json.loads(description.read_text())["content"]["train"] == [7, 3]
    for path in [*(tmp_path / "cache").rglob("*"), tmp_path / "cache"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    build = Builder()
    check(cache.tokens(1, build))
    assert not build.count and not reports


def test_where_tokens_are_kept(monkeypatch, tmp_path, reports):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = Builder()
    for _ in range(2):
        check(TokenCache("none", reports.append).tokens(1, build))
    assert build.count == 2 and not list(tmp_path.iterdir())
    check(TokenCache("auto", reports.append).tokens(1, build))
    assert list((tmp_path / "subtrack_jax" / "tokens").glob("[!.]*"))
    monkeypatch.setenv("HOME", str(tmp_path))
    check(TokenCache("~/mine", reports.append).tokens(1, build))
    assert list((tmp_path / "mine").glob("[!.]*"))
    assert not reports


def test_tokens_that_are_cut_off_in_use_are_an_error(cache, tmp_path):
    tokens = cache.tokens(1, Builder())
    os.truncate(next((tmp_path / "cache").glob("*/tokens")), 8)
    with pytest.raises(OSError, match="was cut off while it was in use: start again"):
        tokens.train.tokens[3:6]
