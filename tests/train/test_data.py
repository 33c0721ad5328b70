"""Every token is trained on, or held out, and predicted exactly once."""

import gzip
import itertools

import numpy as np
import pytest

from train import data
from train.config import DataConfig

LENGTH, ROWS = 8, 4
WORDS = ["call", "me", "ishmael", "some", "years", "ago", "never", "mind", "how"]


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    return " ".join(rng.choice(WORDS, 2900)) + ". Überall Wasser 🐋"


@pytest.fixture(scope="module")
def config(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(text)
    return DataConfig(
        data_glob=str(path),
        held_out_fraction=0.1,
        sequence_length_tokens=LENGTH,
        batch_size_sequences=ROWS,
    )


@pytest.fixture(scope="module")
def corpus(config):
    return data.load_corpus(config, vocabulary_size=280)


def first_batches(corpus, config, seed, count):
    return list(itertools.islice(data.train_batches(corpus, config, seed), count))


def test_train_and_held_out_text_make_up_the_whole(text, corpus):
    decode = corpus.tokenizer.decode
    train, held_out = decode(corpus.train_tokens), decode(corpus.held_out_tokens)
    assert train + held_out == text
    assert len(held_out) == pytest.approx(0.1 * len(text), abs=1)


def test_tokenizer_never_saw_the_held_out_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcd " * 900 + "zyxw " * 100)
    config = DataConfig(str(path), 0.1, LENGTH, ROWS)
    corpus = data.load_corpus(config, vocabulary_size=300)
    assert len(corpus.tokenizer.encode(" abcd").ids) == 1
    assert len(corpus.tokenizer.encode(" zyxw").ids) == 5


def test_same_seed_same_batches(corpus, config):
    one, two, other = (first_batches(corpus, config, seed, 5) for seed in (3, 3, 4))
    for batch, again in zip(one, two, strict=True):
        np.testing.assert_equal(batch, again)
    assert any(
        not np.array_equal(batch["inputs"], different["inputs"])
        for batch, different in zip(one, other, strict=True)
    )


def test_an_epoch_holds_every_window_once_and_the_next_is_shuffled_anew(corpus, config):
    tokens = corpus.train_tokens
    count = (len(tokens) - 1) // LENGTH
    batches = first_batches(corpus, config, 0, 2 * count // ROWS + 1)
    rows = [
        np.append(inputs, targets[-1])
        for batch in batches
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True)
    ]
    windows = [tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)]
    epochs = [list(map(tuple, rows[i * count : (i + 1) * count])) for i in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(tuple, windows))
    assert epochs[0] != epochs[1]
    for batch in batches:
        assert batch["inputs"].shape == batch["targets"].shape == (ROWS, LENGTH)
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert batch["mask"].all()


def test_held_out_batches_predict_every_token_but_the_first_once(corpus, config):
    batches = list(data.held_out_batches(corpus, config))
    assert {batch["inputs"].shape for batch in batches} == {(ROWS, LENGTH)}
    predicted = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
    read = np.concatenate([batch["inputs"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(predicted, corpus.held_out_tokens[1:])
    np.testing.assert_array_equal(read, corpus.held_out_tokens[:-1])
    # The fixture leaves a rest, or the padding would go untested.
    assert len(predicted) % (ROWS * LENGTH) != 0


def test_documents_are_read_in_order_and_kept_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("first " * 200)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"second " * 200))
    (tmp_path / "empty.txt").write_text("\n")
    config = DataConfig(f"{tmp_path}/**/*.txt*", 0.1, LENGTH, ROWS)
    corpus = data.load_corpus(config, vocabulary_size=300)
    end = corpus.tokenizer.token_to_id(data.END_OF_TEXT)
    (place,) = np.flatnonzero(corpus.train_tokens == end)
    first, second = corpus.train_tokens[:place], corpus.train_tokens[place + 1 :]
    assert corpus.tokenizer.decode(first) == "first " * 200
    assert corpus.tokenizer.decode(second).startswith("second second")


def test_embedded_text_is_moby_dick():
    text = gzip.decompress(data.EMBEDDED_TEXT.read_bytes()).decode()
    assert "Call me Ishmael." in text[:100]
    assert len(text.encode()) == 1_204_996


@pytest.mark.parametrize(
    ("content", "vocabulary_size", "message"),
    [
        (b"", 300, "no text in"),
        (b"  \n ", 300, "no text in"),
        (b"\xff\xfe\x00", 300, "is not UTF-8"),
        (b"a few words", 300, "too short"),
        (b"enough " * 1000, 256, "--vocabulary-size must be at least 257, got 256"),
    ],
)
def test_useless_texts_are_refused(tmp_path, content, vocabulary_size, message):
    (tmp_path / "text.txt").write_bytes(content)
    config = DataConfig(f"{tmp_path}/*.txt", 0.1, LENGTH, ROWS)
    with pytest.raises(ValueError, match=message):
        data.load_corpus(config, vocabulary_size)


def test_a_pattern_without_files_is_refused(tmp_path):
    config = DataConfig(f"{tmp_path}/*.txt", 0.1, LENGTH, ROWS)
    with pytest.raises(ValueError, match="no file matches"):
        data.load_corpus(config, 300)
