"""Atomic writes: all or nothing, flushed; errors of a full disk name the file."""

import os
import pathlib

import pytest
from matplotlib import figure

from tests.train.program import limited_file_size
from tests.train.tokenization.test_tokenizer import TEXT
from train.config.presets import PRESETS
from train.reports import loss_plot, subspace_plot
from train.rundir.saved_config import save_config
from train.system import files, json_lines
from train.tokenization.tokenizer import Tokenizer


@pytest.fixture
def full_disk():
    with limited_file_size(100):
        yield


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    for content in ("old", "new ∘", b"\x00\xff"):
        files.write_whole(path, content)
        data = content.encode() if isinstance(content, str) else content
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("killed_in", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("No space left"), KeyboardInterrupt()])
def test_a_write_that_is_cut_short_leaves_the_old_file(
    tmp_path, monkeypatch, killed_in, error
):
    path = tmp_path / "file"
    files.write_whole(path, "old")
    write_bytes = pathlib.Path.write_bytes

    def half(self, data):
        write_bytes(self, data[: len(data) // 2])
        raise error

    def killed(*args):
        raise error

    if killed_in == "write_bytes":
        monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    else:
        monkeypatch.setattr(os, killed_in, killed)
    with pytest.raises(type(error)):
        files.write_whole(path, "something new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    files.write_whole(path, "something new")
    assert path.read_text() == "something new"


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    names = {}
    original = os.open

    def opened(path, *args, **options):
        descriptor = original(path, *args, **options)
        names[descriptor] = pathlib.Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(names[number]))
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: calls.append("replace") or replace(*paths)
    )
    files.write_whole(tmp_path / "file", "content")
    assert calls == [".file.partial", "replace", tmp_path.name]


def test_a_program_that_ends_at_once_leaves_no_part(tmp_path):
    with pytest.raises(OSError), files.replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        files.discard_unfinished()
        assert not partial.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_gets_its_name_at_the_end(tmp_path):
    for error in (OSError(28, "No space left on device"), None):
        try:
            with files.replacing(tmp_path / "all") as partial:
                assert not (partial / "first").exists()
                partial.mkdir()
                (partial / "first").write_text("1")
                if error is not None:
                    error.filename = str(partial / "second")
                    raise error
        except OSError as told:
            assert str(told) == (
                f"cannot write {tmp_path}/all/second: No space left on device"
            )
            assert list(tmp_path.iterdir()) == []
    assert (tmp_path / "all" / "first").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_of_another_file_is_told_as_it_is(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="'nowhere'"),
        files.replacing(tmp_path / "file"),
    ):
        pathlib.Path("nowhere").read_text()


def test_a_line_is_added_whole_or_not_at_all(tmp_path, full_disk):
    path = tmp_path / "rows"
    files.append_whole(path, "x" * 60 + "\n")
    with pytest.raises(OSError, match=f"cannot write {path}: File too large"):
        files.append_whole(path, "y" * 60 + "\n")
    files.append_whole(path, "z" * 20 + "\n")
    assert path.read_text() == "x" * 60 + "\n" + "z" * 20 + "\n"


def draw_curve(path):
    loss_plot.plot([{"step": 1, "loss": 1.0}], "title", path)


def draw_subspaces(path):
    row = {"step": 1, "matrix": "up", "layer": 0, "captured_energy": 0.5}
    subspace_plot.plot([row], "title", path)


# Function, file, and expected content of that file.
WRITERS = {
    "config.json": lambda path: save_config(PRESETS["tiny"], path),
    "tokenizer.json": lambda path: Tokenizer.train([TEXT], 300).save(path.parent),
    "curve.png": draw_curve,
    "subspace.png": draw_subspaces,
    "loss.png": lambda path: files.write_figure(path, figure.Figure()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_and_leaves_no_part(tmp_path, name):
    path = tmp_path / name
    with limited_file_size(1000), pytest.raises(OSError) as raised:
        WRITERS[name](path)
    assert str(raised.value) == f"cannot write {path}: File too large"
    assert not path.exists()
    assert not list(tmp_path.glob(".*"))


def test_rows_of_an_earlier_process_survive_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "fsync", lambda number: os.write(-1, b""))
    with pytest.raises(OSError, match=r"cannot write .*/metrics.dropped.jsonl: "):
        json_lines.JsonLines(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
