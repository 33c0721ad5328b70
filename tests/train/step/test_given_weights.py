"""Runs from given weights: defaults, contradictions, embedding growth."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from models import llama_weights
from models.config import LlamaConfig
from tests.models.common import make_params
from tests.train.finished import make_run
from tests.train.program import assert_refuses
from tests.train.tokenization.test_tokenizer import TEXT
from train import pretrain
from train.step import given_weights
from train.tokenization.tokenizer import Tokenizer

SHAPE = LlamaConfig(
    300, 32, 48, num_layers=2, num_heads=4, max_length_tokens=200, norm_epsilon=1e-5
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that tests must not change."""
    directory = tmp_path_factory.mktemp("weights")
    llama_weights.save(directory, SHAPE, make_params(SHAPE))
    Tokenizer.train([TEXT], 300).save(directory)
    return directory


@pytest.fixture
def copy(weights, tmp_path):
    return shutil.copytree(weights, tmp_path / "copy")


def read(*argv):
    return pretrain.read([str(arg) for arg in argv])


def settle(config, notes=()):
    """Settles a config; returns it with the messages."""
    told = []
    settled = given_weights.settle(config, told.append)
    assert len(told) == len(notes)
    for note, words in zip(told, notes, strict=True):
        assert words in note
    return settled


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_token(directory):
    """A tokenizer with one token more than the embedding has rows."""
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.add_special_tokens(["<|im_end|>"])
    raw.save(str(directory / "tokenizer.json"))


def test_given_weights_have_defaults_of_their_own(weights):
    config = read("--init-from", weights)
    assert config.model == SHAPE
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.rank == 8
    assert config.data.sequence_length_tokens == 200
    assert (config.preset, config.init_from) == ("tiny", weights)
    scratch = read()
    assert scratch.optimizer.learning_rate == 3e-3
    assert config.steps == scratch.steps


def test_no_weights_can_be_asked_for():
    assert read("--init-from", "None") == read()


def test_what_is_given_is_taken(weights):
    flags = ["--learning-rate", "3e-3", "--rank", 4, "--sequence-length-tokens", 32]
    for argv in ([*flags, f"--init-from={weights}"], ["--init_from", weights, *flags]):
        config = read(*argv)
        assert config.optimizer.learning_rate == 3e-3
        assert config.optimizer.rank == 4
        assert config.data.sequence_length_tokens == 32


def test_a_preset_lends_its_settings_but_not_its_shape(weights):
    config = read("--preset", "llama-60m", "--init-from", weights)
    assert config.steps == 10_000
    assert config.optimizer.learning_rate == 1e-4
    assert config.model == dataclasses.replace(
        SHAPE, dtype="bfloat16", param_dtype="bfloat16"
    )


def test_a_saved_config_lends_its_settings_too(weights, copy, tmp_path):
    make_run(tmp_path / "scratch", Tokenizer.train([TEXT], 300))
    scratch = ["--config", tmp_path / "scratch" / "config.json"]
    config = read(*scratch, "--init-from", weights)
    assert (config.model, config.optimizer.learning_rate) == (SHAPE, 1e-4)
    assert config.data == read(*scratch).data  # includes the sequence length
    # Its config has values for given weights.
    saved = settle(read("--init-from", weights, "--learning-rate", 1))
    pretrain_config = tmp_path / "config.json"
    values = dataclasses.asdict(saved)
    del values["start"]
    pretrain_config.write_text(json.dumps(values, default=str))
    again = read("--config", pretrain_config)
    assert settle(again).model == saved.model
    moved = read("--config", pretrain_config, "--init-from", copy)
    assert moved.optimizer.learning_rate == 1
    assert settle(moved).data.tokenizer == str(copy)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden-size", 64], "--hidden-size 64 here, 32 there"),
        (["--hidden-size", 256], "--hidden-size 256 here, 32 there"),  # from the preset
        (["--mlp-size", 96], "--mlp-size 96 here, 48 there"),
        (["--num-layers", 3], "--num-layers 3 here, 2 there"),
        (["--num-heads", 2], "--num-heads 2 here, 4 there"),
        (["--num-key-value-heads", 2], "--num-key-value-heads 2 here, 4 there"),
        (["--head-dim", 16], "--head-dim 16 here, 8 there"),
        (["--tie-embeddings"], "--tie-embeddings True here, False there"),
        (["--rotary-base", 5e5], "--rotary-base 500000.0 here, 10000.0 there"),
        (["--rotary-scaling-factor", 8], "--rotary-scaling-factor 8.0 here, None"),
        (["--norm-epsilon", 1e-6], "--norm-epsilon 1e-06 here, 1e-05 there"),
        (["--init-std", 0.1], "--init-std 0.1 here, 0.02 there"),
        (["--max-length-tokens", 999], "--max-length-tokens 999 here, 200 there"),
        (["--vocabulary-size", 301], "--vocabulary-size 301 here, 300 there; leave"),
        (["--vocabulary-size", 301], "enlarge the embedding with --resize-embedding"),
        (["--vocabulary-size", 299], "--vocabulary-size 299 here, 300 there"),
        (
            ["--vocabulary-size", 299, "--resize-embedding"],
            "--vocabulary-size 299 here, 300 there; leave such flags out",
        ),
        (["--num-layers", 3, "--mlp-size", 9], "--mlp-size 9 here, 48 there; --num-l"),
    ],
)
def test_flags_that_contradict_the_weights_are_refused(
    weights, capsys, tmp_path, flags, message
):
    argv = ["--init-from", weights, "--output-dir", tmp_path / "run", *flags]
    assert_refuses(pretrain.main, capsys, argv, f"of --init-from {weights}", message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--hidden-size", 32, "--num-layers", 2, "--vocabulary-size", 300],
        ["--num-key-value-heads", 4, "--head-dim", 8],
        ["--norm-epsilon", 9.9999997e-06, "--rotary-base", 10_000],
        ["--no-tie-embeddings", "--max-length-tokens", 200],
    ],
)
def test_flags_that_agree_are_none(weights, flags):
    assert settle(read("--init-from", weights, *flags)).model == SHAPE


def test_how_the_model_is_computed_is_free(weights):
    flags = ["--dtype", "bfloat16", "--param-dtype", "bfloat16", "--remat", "full"]
    model = settle(read("--init-from", weights, *flags)).model
    changed = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat": "full"}
    assert model == dataclasses.replace(SHAPE, **changed)


def test_an_embedding_smaller_than_the_tokenizer_grows_if_asked(copy, capsys):
    add_token(copy)
    argv = ["--init-from", copy]
    message = f"{copy}) has 301 tokens, the embedding of --init-from {copy} 300 rows: "
    assert_refuses(pretrain.main, capsys, argv, message, "with --resize-embedding")
    config = settle(read(*argv, "--resize-embedding"))
    assert config.model == dataclasses.replace(SHAPE, vocabulary_size=301)
    params, before = given_weights.load(config), make_params(SHAPE)
    embedding, old = params["embedding"]["embedding"], before["embedding"]["embedding"]
    np.testing.assert_array_equal(embedding[:300], old)
    np.testing.assert_allclose(embedding[300], old.mean(0), atol=1e-6)
    kernel, old = params["head"]["kernel"], before["head"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :300], old)
    np.testing.assert_allclose(kernel[:, 300], old.mean(1), atol=1e-6)
    for name in ("layers", "norm"):
        jax.tree.map(np.testing.assert_array_equal, params[name], before[name])
    # Embeddings are often larger than the vocabulary, for efficiency.
    config = read(*argv, "--resize-embedding", "--vocabulary-size", 320)
    assert settle(config).model.vocabulary_size == 320
    assert len(given_weights.load(config)["embedding"]["embedding"]) == 320


def test_an_embedding_that_is_large_enough_stays(weights):
    config = settle(read("--init-from", weights, "--resize-embedding"))
    assert config.model == SHAPE
    jax.tree.map(
        np.testing.assert_array_equal, given_weights.load(config), make_params(SHAPE)
    )


def test_the_embedding_of_fresh_weights_is_not_resized(capsys):
    argv = ["--resize-embedding"]
    assert_refuses(pretrain.main, capsys, argv, "--resize-embedding needs --init-from")


def test_weights_are_read_before_the_text(copy, tmp_path, capsys):
    path = copy / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    safetensors.numpy.save_file(tensors, path)
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe no text")
    argv = ["--init-from", copy, "--data-glob", text, "--output-dir", tmp_path / "run"]
    message = (
        f"model.layers.1.mlp.up_proj.weight in {copy} holds 1 numbers that are NaN"
    )
    assert_refuses(pretrain.main, capsys, argv, message)
    path.write_bytes(path.read_bytes()[:-100])
    assert_refuses(pretrain.main, capsys, argv, "is damaged or incomplete")
    edit(copy / "config.json", hidden_size=32.0)
    assert_refuses(pretrain.main, capsys, argv, f"{copy}/config.json: hidden_size=32.0")


def test_what_holds_no_weights_is_one_line(copy, tmp_path, capsys):
    argv = ["--init-from", tmp_path / "none"]
    assert_refuses(pretrain.main, capsys, argv, "none is not a directory: give the one")
    argv = ["--init-from", copy / "model.safetensors"]
    assert_refuses(pretrain.main, capsys, argv, "safetensors is not a directory")
    argv = ["--init-from", tmp_path]
    assert_refuses(pretrain.main, capsys, argv, f"{tmp_path} has no config.json: give")
    make_run(tmp_path / "run", Tokenizer.train([TEXT], 300))
    argv = ["--init-from", tmp_path / "run"]
    assert_refuses(pretrain.main, capsys, argv, "is the directory of a run: export")
    (copy / "tokenizer.json").unlink()
    argv = ["--init-from", copy]
    assert_refuses(
        pretrain.main, capsys, argv, "holds neither tokenizer.json", "--token"
    )


def test_a_home_is_found_and_longer_sequences_are_told(weights, monkeypatch):
    monkeypatch.setenv("HOME", str(weights.parent))
    config = read(f"--init-from=~/{weights.name}", "--sequence-length-tokens", 201)
    assert config.init_from == weights
    settle(config, ["--sequence-length-tokens 201 is more than the 200 tokens that"])


def test_a_tokenizer_from_elsewhere_has_the_weights_special_tokens(copy, tmp_path):
    add_token(copy)
    other = (copy / "tokenizer.json").rename(tmp_path / "other.json")
    for file in ("generation_config.json", "tokenizer_config.json"):
        (copy / file).unlink()
    edit(copy / "config.json", eos_token_id=300)
    config = read("--init-from", copy, "--tokenizer", other, "--resize-embedding")
    assert settle(config).data.tokenizer == str(other)
    assert given_weights.open_tokenizer(config).end_of_text == 300


def test_what_weights_have_not_read_is_told(copy, tmp_path):
    raw = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    raw.save(str(copy / "tokenizer.json"))
    given = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(given))
    begins = "begins texts with <|endoftext|>, documents do not"
    settle(read("--init-from", copy), [begins])
    for flag in ("--bos", "--bos-and-eos"):
        settle(read("--init-from", copy, flag))
    Tokenizer.train(["Another text"], 280).save(tmp_path)
    other = f"--tokenizer {tmp_path} gives other tokens than the tokenizer in"
    settle(read("--init-from", copy, "--tokenizer", tmp_path), [other])
    same = copy / "tokenizer.json"
    settle(read("--init-from", copy, "--tokenizer", same, "--bos"))
