"""Export of a run in Hugging Face's layout, as other programs read it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
from flax import nnx

from models import llama, llama_weights, safetensors_files
from tests.train.finished import MODEL, damage, make_run
from tests.train.program import assert_refuses, limited_file_size
from tests.train.tokenization.test_tokenizer import BOOK, TEXT
from train import export
from train.generation import exporting
from train.rundir import trained_model as trained
from train.rundir.checkpoints import CHECKPOINTS
from train.tokenization.tokenizer import END_OF_TEXT, Tokenizer

WORDS = BOOK[1000:1500] + " – 鯨 ∘\n\n  Ahab"  # noqa: RUF001


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    target = tmp_path_factory.mktemp("exports") / "whale"
    return exporting.export(export.ExportConfig(finished_run, output_dir=target))


def assert_same_tree(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, leaf_ in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        assert leaf.dtype == leaf_.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(leaf_).tobytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"dtype": "bfloat16", "param_dtype": "bfloat16"},
        {"max_length_tokens": 4096},
        {"max_length_tokens": 100},
    ],
    ids=["plain", "tied", "bfloat16", "longer", "shorter"],
)
def test_an_export_is_read_back_to_the_last_bit(tmp_path, capsys, changes):
    directory = tmp_path / "run"
    model = dataclasses.replace(MODEL, **changes)
    _, params = make_run(directory, Tokenizer.train([TEXT], 300), model)
    export.main(["--checkpoint", str(directory)])
    out, err = capsys.readouterr()
    target = directory / "hf"
    assert (out, err) == (f"Exported step 10\nWritten to {target}\n", "")
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config, loaded = llama_weights.load(target)
    length = 4096 if model.max_length_tokens == 4096 else 128  # the length in training
    changed = {"init_std": model.init_std, "max_length_tokens": length}
    assert config == dataclasses.replace(model, **changed)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == length
    assert_same_tree(loaded, params)


def test_others_may_read_what_they_may_read_beside_it(exported):
    beside = exported.parent / "beside"
    beside.mkdir()
    assert exported.stat().st_mode == beside.stat().st_mode
    beside.rmdir()


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def test_transformers_computes_the_same_logits(transformers, finished_run, exported):
    import torch

    ours = trained.load(finished_run)
    tokens = np.array([ours.tokenizer.encode(WORDS)[:100]])
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert model.config.eos_token_id == ours.tokenizer.end_of_text
    length = ours.config.data.sequence_length_tokens
    assert model.config.max_position_embeddings == length
    with torch.no_grad():
        found = model(torch.tensor(tokens)).logits.numpy()
    expected = nnx.jit(llama.Llama.__call__)(ours.model, tokens)
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_transformers_generates_from_it(transformers, exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("The whale", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(tokens[0]).startswith("The whale")


def test_transformers_reads_the_tokenizer(transformers, finished_run, exported):
    ours = Tokenizer.load(finished_run)
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert theirs.encode(WORDS, add_special_tokens=False) == ours.encode(WORDS)
    assert theirs.encode(WORDS) == ours.encode(WORDS)
    assert theirs.decode(ours.encode(WORDS)) == WORDS
    assert theirs.eos_token == END_OF_TEXT
    assert theirs.eos_token_id == ours.end_of_text
    with_end = [*ours.encode("whale"), ours.end_of_text]
    assert theirs.decode(with_end, skip_special_tokens=True) == ours.decode(with_end)
    assert len(theirs) == ours.vocabulary_size


def mark_texts(directory, begin, end):
    """Adds files of weights to a tokenizer; returns it as training uses it."""
    Tokenizer.train([TEXT], 300).save(directory)
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 300)]
    )
    raw.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    given = {"eos_token_id": [301, 0], "bos_token_id": 300, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(given))
    tokenizer = Tokenizer.open(str(directory))
    tokenizer.mark_documents(begin=begin, end=end)
    return tokenizer


@pytest.mark.parametrize(
    ("begin", "end", "ends"),
    [(False, True, [301, 0]), (True, True, [301, 0]), (True, False, [301, 0, 300])],
)
def test_special_tokens_are_those_of_the_weights(tmp_path, begin, end, ends):
    tokenizer = mark_texts(tmp_path, begin, end)
    directory = tmp_path / "run"
    make_run(directory, tokenizer, dataclasses.replace(MODEL, vocabulary_size=302))
    target = exporting.export(export.ExportConfig(directory))
    for file in ("config.json", "generation_config.json"):
        found = json.loads((target / file).read_text())
        assert found["eos_token_id"] == ends
        assert (found["bos_token_id"], found["pad_token_id"]) == (300, 0)
    raw = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
    assert raw.encode(WORDS).ids == [*[300] * begin, *tokenizer.encode(WORDS)]
    # Exported weights can be imported again.
    assert Tokenizer.open(str(target)).special.ends == tuple(ends)


def test_a_beginning_that_training_never_saw_is_not_exported(tmp_path):
    """A run directory of an earlier version, without the file of settings."""
    directory = tmp_path / "run"
    tokenizer = mark_texts(tmp_path, begin=False, end=True)
    make_run(directory, tokenizer, dataclasses.replace(MODEL, vocabulary_size=302))
    shutil.copy(tmp_path / "tokenizer.json", directory)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (directory / name).unlink()
    assert Tokenizer.load(directory).begins_texts
    target = exporting.export(export.ExportConfig(directory))
    raw = tokenizers.Tokenizer.from_file(str(target / "tokenizer.json"))
    assert raw.encode(WORDS).ids == tokenizer.encode(WORDS)
    assert not Tokenizer.load(target).begins_texts


@pytest.mark.parametrize("begin", [False, True])
def test_transformers_begins_texts_as_training_did(transformers, tmp_path, begin):
    tokenizer = mark_texts(tmp_path, begin, True)
    directory = tmp_path / "run"
    make_run(directory, tokenizer, dataclasses.replace(MODEL, vocabulary_size=302))
    target = exporting.export(export.ExportConfig(directory))
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    assert theirs.encode(WORDS) == tokenizer.prompt(WORDS)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (301, 300)
    assert theirs.pad_token_id == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert model.generation_config.eos_token_id == [301, 0]


# Made like LLaMA's own tokenizer.
LLAMAS = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "vocab_size": 360,
}


def with_sentencepiece(finished_run, tmp_path, **options):
    """The finished run, with a SentencePiece tokenizer."""
    directory = shutil.copytree(finished_run, tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(directory / "tokenizer"),
        minloglevel=2,
        **LLAMAS | options,
    )
    (directory / "tokenizer.vocab").unlink()
    return directory


def test_a_sentencepiece_model_is_exported_too(transformers, finished_run, tmp_path):
    directory = with_sentencepiece(finished_run, tmp_path)
    target = exporting.export(export.ExportConfig(directory))
    content = (directory / "tokenizer.model").read_bytes()
    assert (target / "tokenizer.model").read_bytes() == content
    ours = Tokenizer.load(target)
    settings = json.loads((target / "config.json").read_text())
    assert settings["eos_token_id"] == ours.end_of_text
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    assert theirs.encode(WORDS) == ours.encode(WORDS)
    assert theirs.decode(ours.encode(WORDS)) == WORDS
    assert theirs.eos_token_id == ours.end_of_text
    ids = [*ours.encode("whale"), ours.end_of_text]
    assert theirs.decode(ids, skip_special_tokens=True) == "whale"


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_a_tokenizer_that_would_be_read_as_another_is_refused(
    finished_run, tmp_path, capsys, options
):
    directory = with_sentencepiece(finished_run, tmp_path, **options)
    before = sorted(directory.iterdir())
    assert_error(capsys, ["--checkpoint", directory], "not of LLaMA's kind")
    assert sorted(directory.iterdir()) == before


def test_the_same_tokenizer_as_json_is_the_way_out(finished_run, tmp_path):
    directory = with_sentencepiece(finished_run, tmp_path, model_type="unigram")
    Tokenizer.train([TEXT], 300).save(directory)
    target = exporting.export(export.ExportConfig(directory))
    assert not (target / "tokenizer.model").exists()


def assert_error(capsys, argv, *messages):
    assert_refuses(export.main, capsys, argv, *messages)


def test_a_target_that_holds_something_is_left_as_it_is(finished_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    file = tmp_path / "full" / "notes.txt"
    file.write_text("mine")
    for target in (file.parent, file):
        argv = ["--checkpoint", finished_run, "--output-dir", target]
        assert_error(capsys, argv, f"--output-dir {target} is not empty")
    target = file / "hf"
    argv = ["--checkpoint", finished_run, "--output-dir", target]
    assert_error(capsys, argv, f"--output-dir {target}: ")
    assert list(tmp_path.iterdir()) == [file.parent]
    assert list(file.parent.iterdir()) == [file]
    assert file.read_text() == "mine"


def test_a_second_export_is_refused(exported, finished_run, capsys):
    before = {path: path.stat().st_mtime_ns for path in exported.iterdir()}
    argv = ["--checkpoint", finished_run, "--output-dir", exported]
    assert_error(capsys, argv, "is not empty")
    assert {path: path.stat().st_mtime_ns for path in exported.iterdir()} == before


def test_an_empty_directory_and_one_below_none_will_do(finished_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "some" / "where"):
        exporting.export(export.ExportConfig(finished_run, output_dir=target))
        assert (target / "model.safetensors").exists()
        assert not list(target.parent.glob(".*"))


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_an_export_that_fails_half_way_leaves_nothing(
    finished_run, tmp_path, capsys, monkeypatch, part
):
    def full_disk(*args, **options):
        raise OSError("No space left on device")

    if part == "model":
        monkeypatch.setattr(safetensors_files, "write_json", full_disk)
    else:
        monkeypatch.setattr(Tokenizer, "save", full_disk)
    argv = ["--checkpoint", finished_run, "--output-dir", tmp_path / "hf"]
    assert_error(capsys, argv, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("most_bytes", "file"), [(1_000, "tokenizer.json"), (60_000, "model.safetensors")]
)
def test_a_full_disk_names_the_file_and_leaves_nothing(
    finished_run, tmp_path, capsys, most_bytes, file
):
    target = tmp_path / "whale"
    argv = ["--checkpoint", finished_run, "--output-dir", target]
    with limited_file_size(most_bytes):
        message = f"cannot write {target / file}: File too large"
        assert_refuses(export.main, capsys, argv, message)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_one_line_and_leaves_nothing(
    finished_run, tmp_path, capsys
):
    target = tmp_path / "hf"
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    argv = ["--output-dir", target, "--checkpoint"]
    assert_error(capsys, [*argv, tmp_path], "is not the directory of a run")
    damage(copy)
    assert_error(capsys, [*argv, copy], "the checkpoint of step 10 in")
    shutil.rmtree(copy / CHECKPOINTS)
    assert_error(capsys, [*argv, copy], f"there are no checkpoints in {copy}")
    assert list(tmp_path.iterdir()) == [copy]


def test_other_forms_are_not_known(finished_run, capsys):
    assert_error(capsys, ["--checkpoint", finished_run, "--to", "gguf"], "gguf")
