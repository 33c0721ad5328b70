"""Text from the model of a run, and one line where there is none."""

import shutil

import pytest

from tests.train.finished import damage, make_run
from tests.train.program import assert_refuses
from tests.train.test_tokenizer import train_sentencepiece
from train import generate, sampling
from train.checkpoint import CHECKPOINTS
from train.run import CONFIG_FILE
from train.tokenizer import Tokenizer


@pytest.fixture
def copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


def texts_of(capsys, directory, *argv):
    given = ["--checkpoint", directory, "--length-tokens", 12, *argv]
    generate.main([str(arg) for arg in given])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_prompt_is_continued(finished_run, capsys):
    out = texts_of(capsys, finished_run, "--prompt", "Call me ∘ ")
    assert out.startswith("Call me ∘ ")
    assert len(out) > len("Call me ∘ ") + 6
    assert texts_of(capsys, finished_run).startswith("The whale")


def test_the_seed_decides_the_text(finished_run, capsys):
    one, again, other = (
        texts_of(capsys, finished_run, "--seed", seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_every_sample_is_another(finished_run, capsys):
    config = generate.GenerateConfig(finished_run, num_samples=4, length_tokens=12)
    texts = sampling.generate(config)
    assert len(set(texts)) == 4
    assert all(text.startswith("The whale") for text in texts)
    out = texts_of(capsys, finished_run, "--num-samples", 4)
    assert out == "\n\n".join(texts) + "\n"


def test_a_low_temperature_leaves_no_choice(finished_run, capsys):
    cold = {
        texts_of(capsys, finished_run, "--temperature", 1e-4, "--seed", seed)
        for seed in (1, 2)
    }
    assert len(cold) == 1


def test_sentencepiece_keeps_the_space_after_the_prompt(tmp_path, capsys):
    tokenizer = Tokenizer.open(str(train_sentencepiece(tmp_path)))
    directory = tmp_path / "run"
    make_run(directory, tokenizer)
    texts = sampling.generate(
        generate.GenerateConfig(directory, num_samples=40, length_tokens=4)
    )
    assert all(text.startswith("The whale") for text in texts)
    assert any(text.startswith("The whale ") for text in texts)
    assert not all(text.startswith("The whale ") for text in texts)


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
        ("--prompt", ""),
        ("--length-tokens", "0"),
        ("--num-samples", "0"),
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--seed", "-1"),
    ],
)
def test_bad_values_are_one_line_that_names_the_flag(finished_run, capsys, flag, value):
    assert_error(capsys, ["--checkpoint", finished_run, flag, value], f"{flag} must")


def test_the_run_has_to_be_named(capsys):
    assert_error(capsys, [], "--checkpoint")
