"""Tokenizers of both libraries: round trips, no special tokens from text."""

import gzip
import json
import pathlib
import sys

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from train.data import pieces as pieces_module
from train.data.pieces import split_documents
from train.data.sources import EMBEDDED_TEXT
from train.tokenization import special_tokens
from train.tokenization import tokenizer as tokenizer_module
from train.tokenization.tokenizer import END_OF_TEXT, Tokenizer

BOOK = gzip.decompress(EMBEDDED_TEXT.read_bytes()).decode()
TEXT = BOOK[:20_000]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train([TEXT], 300)


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


def train_sentencepiece(directory, **options):
    prefix = directory / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(prefix),
        vocab_size=200,
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(params=["bpe", "sentencepiece"])
def tokenizer(request, bpe, sentencepiece_path):
    if request.param == "bpe":
        return bpe
    return Tokenizer.open(str(sentencepiece_path))


def test_text_comes_back_from_its_ids(tokenizer):
    text = "years ago, Ishmael"
    ids = tokenizer.encode(text)
    assert 0 < len(ids) < len(text)
    assert max(ids) < tokenizer.vocabulary_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "ago"]) == [ids, tokenizer.encode("ago")]


def test_decode_leaves_out_the_end_and_ids_without_a_token(tokenizer):
    ids = tokenizer.encode("me")
    spoiled = np.array([tokenizer.end_of_text, *ids, tokenizer.vocabulary_size + 5])
    assert tokenizer.decode(spoiled) == "me"


@pytest.mark.parametrize("spelled", [END_OF_TEXT, "</s>"])
def test_text_that_spells_the_end_does_not_become_it(tokenizer, spelled):
    assert tokenizer.end_of_text not in tokenizer.encode(f"me{spelled}long")


def test_a_saved_tokenizer_is_the_same_when_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    (file,) = tmp_path.glob("tokenizer.[jm]*")
    for loaded in (Tokenizer.load(tmp_path), Tokenizer.open(str(file))):
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.vocabulary_size == tokenizer.vocabulary_size
        assert loaded.special == tokenizer.special
        assert loaded.end_of_text not in loaded.encode(END_OF_TEXT)


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, begin):
        pathlib.Path(path).write_bytes(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(tokenizer._backend, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_settings_for_short_texts_are_dropped(tmp_path):
    """As in sentence encoders, whose files truncate, pad and add special tokens."""
    raw = tokenizers.Tokenizer(models.WordLevel({"[SEP]": 0, "me": 1, "[UNK]": 5}))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 0)]
    )
    raw.add_special_tokens(["[SEP]"])
    raw.enable_truncation(4)
    raw.enable_padding(length=8, pad_id=5)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(str(tmp_path))
    assert tokenizer.encode_batch(["me", "me " * 10]) == [[1], [1] * 10]
    assert tokenizer.end_of_text == 0
    assert tokenizer.vocabulary_size == 6  # ids have gaps


def test_end_of_text_by_name_where_a_model_has_no_role_for_it(tmp_path):
    path = train_sentencepiece(tmp_path, eos_id=-1, control_symbols=["<eos>"])
    tokenizer = Tokenizer.open(str(path))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.end_of_text == model.piece_to_id("<eos>") != model.unk_id()
    assert tokenizer.end_of_text not in tokenizer.encode("me <eos>")
    (tmp_path / "without").mkdir()
    path = train_sentencepiece(tmp_path / "without", eos_id=-1)
    with pytest.raises(ValueError, match=r"no token that ends a text.*<\|endoftext"):
        Tokenizer.open(str(path))


@pytest.mark.parametrize("wide", ["\n", " "])
def test_pieces_are_encoded_as_the_whole_is(wide, monkeypatch):
    text = BOOK[:60_000].replace("\n", wide)
    whole = Tokenizer.train([text], 1000)
    monkeypatch.setattr(pieces_module, "PIECE_CHARACTERS", 500)
    pieces = list(split_documents([text, "short"]))
    assert len(pieces) > 100
    assert "".join(piece for piece, _ in pieces[:-1]) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 2) + [True] * 2
    assert max(len(piece) for piece, _ in pieces) <= 500
    ids = [i for one in whole.encode_batch([p for p, _ in pieces[:-1]]) for i in one]
    assert ids == whole.encode(text)
    again = Tokenizer.train((piece for piece, _ in pieces[:-1]), 1000)
    assert again.encode(text) == ids


def test_text_without_spaces_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE_CHARACTERS", 10)
    assert [p for p, _ in split_documents(["鯨" * 25])] == ["鯨" * 10] * 2 + ["鯨" * 5]
    assert [p for p, _ in split_documents(["鯨鯨鯨\n" * 4])] == ["鯨鯨鯨\n" * 2] * 2


def test_training_reads_only_the_first_stretch(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_TEXT_CHARACTERS", 600)
    pieces = iter([" abcd" * 100, " efgh" * 20 + " zyxw" * 90, " never"])
    tokenizer = Tokenizer.train(pieces, 300)
    assert next(pieces) == " never"
    for text, count in [(" abcd", 1), (" efgh", 1), (" zyxw", 5)]:
        assert len(tokenizer.encode(text)) == count


def test_hub_names_are_looked_up_in_both_forms(bpe, sentencepiece_path, monkeypatch):
    asked = []

    def download(name, file):
        asked.append((name, file))
        if file == "tokenizer.json":
            raise huggingface_hub.errors.EntryNotFoundError("404")
        return str(sentencepiece_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    opened = Tokenizer.open("someone/llama")
    assert opened.encode(TEXT) == Tokenizer.open(str(sentencepiece_path)).encode(TEXT)
    assert asked[:2] == [
        ("someone/llama", "tokenizer.json"),
        ("someone/llama", "tokenizer.model"),
    ]
    assert {file for _, file in asked[2:]} == set(special_tokens.BESIDE)


def test_a_tokenizer_in_the_hubs_cache_needs_no_network(bpe, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--small"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    bpe.save(repository / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Tokenizer.open("someone/small").encode(TEXT) == bpe.encode(TEXT)
    with pytest.raises(OSError, match="--tokenizer someone/other: no such file or dir"):
        Tokenizer.open("someone/other")


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"holds neither tokenizer.json nor tokenizer.m"):
        Tokenizer.open(str(tmp_path))
    with pytest.raises(OSError, match=r"--tokenizer .*missing.json: no such file"):
        Tokenizer.open(str(tmp_path / "missing.json"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json"):
        Tokenizer.open(str(tmp_path))
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json has no tokens"):
        Tokenizer.open(str(tmp_path))
    for content, message in [
        (b"abc", "is not a SentencePiece"),
        (b"", "is empty"),
    ]:
        (tmp_path / "a.model").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.open(str(tmp_path / "a.model"))
    with pytest.raises(ValueError, match="--vocabulary-size must be at least 257, got"):
        Tokenizer.train([TEXT], 256)
    with pytest.raises(ValueError, match="--vocabulary-size must be at most 10000000"):
        Tokenizer.train([TEXT], 2 * 10**9)


def test_a_missing_package_is_named(sentencepiece_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        Tokenizer.open(str(sentencepiece_path))
