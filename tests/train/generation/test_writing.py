"""Streamed text equals the text of all tokens, in complete characters."""

import itertools

import numpy as np
import pytest

from models import generation
from tests.train.tokenization.test_tokenizer import TEXT, train_sentencepiece
from train.generation import writing
from train.tokenization.tokenizer import Tokenizer

WORDS = "Café naïve ∘∘ 🐋 鯨が来た! \n\n  two  spaces\tand a tab"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    model = train_sentencepiece(tmp_path_factory.mktemp("tokenizer"))
    return {
        "bytes": Tokenizer.train([TEXT], 300),
        "sentencepiece": Tokenizer.open(str(model)),
    }


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(tokenizers, request):
    return tokenizers[request.param]


@pytest.mark.parametrize("split", [0, 1, 3])
def test_the_pieces_are_the_text_in_whole_characters(tokenizer, split):
    ids = tokenizer.encode(WORDS)
    stream = writing.TextStream(tokenizer, ids[:split])
    pieces = [stream.add(i) for i in ids[split:]]
    known = tokenizer.decode(ids[:split]).rstrip("\ufffd")
    assert known + "".join(pieces) == tokenizer.decode(ids)
    assert stream.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    # Written as soon as it is complete.
    assert sum(map(bool, pieces)) > len(pieces) / 3


def test_half_a_character_waits_and_is_dropped_at_the_end(tokenizers):
    tokenizer = tokenizers["bytes"]
    whale = tokenizer.encode("🐋")
    assert len(whale) == 4
    stream = writing.TextStream(tokenizer, tokenizer.encode("a"))
    assert [stream.add(i) for i in whale] == ["", "", "", "🐋"]
    assert [stream.add(i) for i in whale[:3]] == ["", "", ""]
    assert stream.finish() == ""
    # Bytes that cannot become a character are shown as a replacement.
    assert stream.add(tokenizer.encode("b")[0]).endswith("b")


def test_special_tokens_have_no_text(tokenizer):
    stream = writing.TextStream(tokenizer, [])
    ids = [tokenizer.end_of_text, *tokenizer.encode("The whale")]
    assert "".join(map(stream.add, ids)) + stream.finish() == "The whale"


def written(monkeypatch, tokenizer, rows):
    """Text that `write` yields for a model that returns these rows."""
    steps = itertools.zip_longest(*rows, fillvalue=generation.ENDED)
    monkeypatch.setattr(
        generation, "stream", lambda *args, **options: map(np.array, steps)
    )
    return list(
        writing.write(
            None,
            tokenizer,
            "The",
            np.zeros(len(rows)),
            length=9,
            sampling=generation.PLAIN,
            positions=99,
        )
    )


def test_samples_come_one_after_the_other(monkeypatch, tokenizers):
    tokenizer = tokenizers["bytes"]
    texts = ["ab", "", "abcdefgh", "xyz", "é and a longer one"]
    pieces = written(monkeypatch, tokenizer, [tokenizer.encode(t) for t in texts])
    samples = [sample for sample, _ in pieces]
    assert samples == sorted(samples) and set(samples) == set(range(5))
    for sample, text in enumerate(texts):
        assert "".join(piece for i, piece in pieces if i == sample) == text
    # The third is printed while drawn, after the first two are complete.
    assert [piece for i, piece in pieces if i == 2][:3] == ["abc", "d", "e"]


def test_an_empty_prompt_is_what_comes_before_a_text(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert writing.prompt_ids(tokenizer, "", 9) == [tokenizer.end_of_text]
    with pytest.raises(ValueError, match=r"--x has \d+ tokens, more than the 3 that"):
        writing.prompt_ids(tokenizer, "Call me Ishmael", 3, "--x")
