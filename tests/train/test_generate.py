"""`train.generate`: text from the model of a run, errors in one line."""

import io
import json
import os
import shutil
import sys

import pytest

from tests.train.finished import damage, make_run
from tests.train.program import assert_refuses
from tests.train.tokenization.test_tokenizer import TEXT, train_sentencepiece
from train import export, generate
from train.generation import exporting, language_model, sampling
from train.rundir.checkpoints import CHECKPOINTS
from train.rundir.saved_config import CONFIG_FILE
from train.tokenization.tokenizer import Tokenizer


@pytest.fixture
def copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


def text_of(capsys, directory, *argv):
    given = ["--checkpoint", directory, "--length-tokens", 12, *argv]
    generate.main([str(arg) for arg in given])
    out, err = capsys.readouterr()
    assert err == f"{directory}, step 10\n"
    assert out.endswith("\n")
    return out[:-1]


def samples_of(directory, prompt="The whale", **values):
    """Texts of the samples, without the prompt."""
    config = generate.GenerateConfig(directory, **{"length_tokens": 12} | values)
    texts = {}
    for sample, text in sampling.generate(
        config, language_model.load(directory), prompt
    ):
        texts[sample] = texts.get(sample, "") + text
    return list(texts.values())


def test_a_prompt_is_continued(finished_run, capsys):
    out = text_of(capsys, finished_run, "--prompt", "Call me ∘ ")
    assert out.startswith("Call me ∘ ")
    assert len(out) > len("Call me ∘ ") + 6
    assert text_of(capsys, finished_run).startswith("The whale")


def test_an_empty_prompt_begins_a_text(finished_run, capsys):
    out = text_of(capsys, finished_run, "--prompt", "", "--temperature", 0)
    assert len(out) > 6


def test_special_tokens_in_a_prompt_are_text_and_it_is_told(finished_run, capsys):
    argv = ["--prompt", "a<|endoftext|>b", "--length-tokens", "2"]
    generate.main(["--checkpoint", str(finished_run), *argv])
    out, err = capsys.readouterr()
    assert out.startswith("a<|endoftext|>b")
    assert "warning: <|endoftext|> in the prompt is read as text, not as a" in err


@pytest.mark.parametrize("content", [b"Call me", b"\xef\xbb\xbfCall me\r\n"])
def test_a_prompt_is_read_from_a_file(
    finished_run, tmp_path, capsys, monkeypatch, content
):
    """Without the byte order mark and the line break that editors add."""
    flags = ["--temperature", 0]
    want = text_of(capsys, finished_run, "--prompt", "Call me", *flags)
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert text_of(capsys, finished_run, "--prompt-file", path, *flags) == want
    stdin = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert text_of(capsys, finished_run, "--prompt-file", "-", *flags) == want


def test_the_seed_decides_the_text(finished_run, capsys):
    one, again, other = (
        text_of(capsys, finished_run, "--seed", seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_every_sample_is_another(finished_run, capsys, monkeypatch):
    texts = samples_of(finished_run, num_samples=4)
    assert len(set(texts)) == 4
    out = text_of(capsys, finished_run, "--num-samples", 4)
    assert out == "\n\n".join("The whale" + text for text in texts)
    # Independent of the batch size and the number of samples.
    monkeypatch.setattr(sampling, "SAMPLES_AT_ONCE", 2)
    assert samples_of(finished_run, num_samples=3) == texts[:3]


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 0],
        ["--temperature", 1e-4],
        ["--temperature", 5, "--top-k", 1],
        ["--temperature", 1, "--top-p", 1e-6],
    ],
)
def test_without_a_choice_the_seed_decides_nothing(finished_run, capsys, flags):
    greedy = text_of(capsys, finished_run, "--temperature", 0)
    assert text_of(capsys, finished_run, *flags, "--seed", 5) == greedy


def test_a_text_ends_where_the_model_ends_it(finished_run, capsys, monkeypatch):
    """A common token is declared an end token."""
    want = samples_of(finished_run, length_tokens=40)[0]
    model = language_model.load(finished_run)
    ids = model.tokenizer.encode("The whale")
    monkeypatch.setattr(
        type(model.tokenizer), "stops", property(lambda self: tuple(range(100, 300)))
    )
    (text,) = samples_of(finished_run, length_tokens=40)
    assert len(text) < len(want) and want.startswith(text)
    assert all(i < 100 for i in model.tokenizer.encode(text)) and ids


def test_a_model_of_hugging_face_writes_the_same(finished_run, tmp_path, capsys):
    directory = tmp_path / "hf"
    config = export.ExportConfig(finished_run, output_dir=directory)
    exporting.export(config)
    argv = ["--checkpoint", directory, "--length-tokens", "12"]
    capsys.readouterr()
    generate.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert out[:-1] == text_of(capsys, finished_run)
    assert err == f"{directory}\n"
    for choice in (["--step", "10"], ["--which", "newest"]):
        message = f"{choice[0]} chooses among the checkpoints of a run"
        assert_error(capsys, [*argv, *choice], message)
    message = "not the directory of a run but a model in Hugging Face's layout"
    assert_refuses(export.main, capsys, argv[:2], message)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"max_position_embeddings": "128"}))
    assert_error(capsys, argv, "max_position_embeddings")
    path.write_text(json.dumps(values | {"max_position_embeddings": 2}))
    assert_error(capsys, argv, "the prompt has ", " tokens, more than the 2 that")
    Tokenizer.train([TEXT], 310).save(directory)
    assert_error(capsys, argv, "has 310 tokens and the model 300")


def test_text_is_printed_as_it_comes(finished_run, capsys, monkeypatch):
    shown = []
    out = sys.stdout
    monkeypatch.setattr(out, "flush", lambda: shown.append(out.getvalue()))
    text = text_of(capsys, finished_run)
    lengths = sorted({len(each) for each in shown})
    assert all(text.startswith(each.rstrip("\n")) for each in shown)
    assert len(lengths) > 5 and lengths[0] < len("The whale") + 3


def test_a_reader_that_leaves_is_no_error(finished_run, capsys, monkeypatch):
    """Like `| head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            generate.main(["--checkpoint", str(finished_run), "--length-tokens", "3"])
        assert stop.value.code == 0
        pipe.flush()  # as Python does at exit
    assert "error" not in capsys.readouterr().err


def test_sentencepiece_keeps_the_space_after_the_prompt(tmp_path, capsys):
    tokenizer = Tokenizer.open(str(train_sentencepiece(tmp_path)))
    directory = tmp_path / "run"
    make_run(directory, tokenizer)
    texts = samples_of(directory, num_samples=40, length_tokens=4)
    assert any(text.startswith(" ") for text in texts)
    assert not all(text.startswith(" ") for text in texts)


def assert_error(capsys, argv, *messages):
    assert_refuses(generate.main, capsys, argv, *messages)


def test_no_run_is_one_line(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "none"):
        message = f"--checkpoint {directory} is not the directory of a run"
        assert_error(capsys, ["--checkpoint", directory], message)
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_yet_is_one_line(copy, capsys):
    shutil.rmtree(copy / CHECKPOINTS)
    message = f"there are no checkpoints in {copy}"
    assert_error(capsys, ["--checkpoint", copy], message)
    assert not (copy / CHECKPOINTS).exists()


def test_a_damaged_checkpoint_is_one_line(copy, capsys):
    damage(copy)
    message = f"the checkpoint of step 10 in {copy / CHECKPOINTS} cannot be read"
    assert_error(capsys, ["--checkpoint", copy], message)


def test_another_version_and_a_lost_tokenizer_are_one_line(copy, capsys):
    (copy / "tokenizer.json").unlink()
    assert_error(capsys, ["--checkpoint", copy], "holds neither tokenizer.json")
    path = copy / CONFIG_FILE
    path.write_text(path.read_text().replace('"rank"', '"breadth"'))
    assert_error(capsys, ["--checkpoint", copy], str(path), "optimizer.breadth")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--length-tokens", "0"),
        ("--num-samples", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "0"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--prompt", "\udcff"),
        ("--seed", "-1"),
    ],
)
def test_bad_values_are_one_line_that_names_the_flag(finished_run, capsys, flag, value):
    assert_error(capsys, ["--checkpoint", finished_run, flag, value], f"{flag} must")


def test_the_run_has_to_be_named(capsys):
    assert_error(capsys, [], "--checkpoint")


def test_choices_without_effect_are_refused(finished_run, capsys):
    argv = ["--checkpoint", finished_run]
    flags = ["--temperature", 0, "--num-samples", 2]
    assert_error(capsys, argv + flags, "--num-samples 2 would be the same text")
    flags = ["--prompt", "a", "--prompt-file", "b"]
    assert_error(capsys, argv + flags, "--prompt and --prompt-file exclude each other")


def test_a_prompt_that_cannot_be_read_is_one_line(
    finished_run, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "prompt.txt"
    argv = ["--checkpoint", finished_run, "--prompt-file", path]
    assert_error(capsys, argv, f"--prompt-file {path}: No such file")
    assert_error(capsys, [*argv[:3], tmp_path], f"--prompt-file {tmp_path}: Is a dir")
    path.write_bytes(b"caf\xe9")
    assert_error(capsys, argv, f"--prompt-file {path} is not UTF-8 text")
    monkeypatch.setattr("sys.stdin", None)  # as with `<&-`
    assert_error(capsys, [*argv[:3], "-"], "--prompt-file -: the standard input is clo")


def test_a_prompt_longer_than_the_model_reads_is_one_line(finished_run, capsys):
    argv = ["--checkpoint", finished_run, "--prompt", "o " * 200]
    assert_error(capsys, argv, "the prompt has ", " tokens, more than the 128 that")
