"""Every token is trained on, or held out, and predicted once; and batches go on."""

import dataclasses
import gzip
import itertools
import json
import os
import shutil

import datasets
import numpy as np
import pytest

from train.config.data_config import DataConfig
from train.data import dataset as data
from train.data import encoding, packing, sources
from train.tokenization.tokenizer import Tokenizer

LENGTH, ROWS = 8, 4
VOCABULARY = 300
WORDS = ["call", "me", "ishmael", "some", "years", "ago", "never", "mind", "how"]


def random_documents(count, words):
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, rng.integers(1, words))) for _ in range(count)]


def describe(packing="packed", **options):
    return DataConfig(
        held_out_fraction=0.1,
        sequence_length_tokens=LENGTH,
        batch_size_sequences=ROWS,
        packing=packing,
        **options,
    )


def open_text(config, seed=0, **options):
    return data.open_text(config, VOCABULARY, seed=seed, **options)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A single document."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    words = np.random.default_rng(0).choice(WORDS, 2900)
    path.write_text(" ".join(words) + ". Überall Wasser 🐋")
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Many documents of 1 to 9 words."""
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl.gz"
    rows = [json.dumps({"text": text}) for text in random_documents(200, 10)]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Dataset as on the hub: two splits, the first in three files."""
    directory = tmp_path_factory.mktemp("dataset")
    for i, size in enumerate([40, 30, 50]):
        rows = {"text": random_documents(size, 10)}
        datasets.Dataset.from_dict(rows).to_parquet(directory / f"train-{i}.parquet")
    rows = {"text": random_documents(33, 10)}
    datasets.Dataset.from_dict(rows).to_parquet(directory / "validation.parquet")
    return directory


@pytest.fixture(params=["files", "dataset"])
def source(request, lines, dataset):
    if request.param == "files":
        return {"data_glob": str(lines)}
    return {"dataset": str(dataset), "shuffle_buffer_documents": 16}


@pytest.fixture(params=["packed", "padded"])
def config(request, source):
    return describe(request.param, **source)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    """Spares the tests of batches the training of a tokenizer each."""
    directory = tmp_path_factory.mktemp("run")
    Tokenizer.train(random_documents(100, 10), VOCABULARY).save(directory)
    return directory


def take(batches, count):
    return list(itertools.islice(batches, count))


def rows_of(batches):
    """The tokens of each row, without padding."""
    rows = []
    for batch in batches:
        for inputs, targets, mask in zip(*batch.values(), strict=True):
            if not (count := mask.sum()):
                continue
            assert mask[:count].all()
            np.testing.assert_array_equal(inputs[1:count], targets[: count - 1])
            assert not inputs[count + 1 :].any()
            rows.append((*inputs[:count].tolist(), *targets[count - 1 : count]))
    return rows


def check_form(batches, rows=ROWS):
    for batch in batches:
        assert list(batch) == ["inputs", "targets", "mask"]
        assert {array.shape for array in batch.values()} == {(rows, LENGTH)}
        assert [array.dtype for array in batch.values()] == [np.int32, np.int32, bool]


def joined(rows):
    """The tokens of packed rows, in order."""
    for row, following in itertools.pairwise(rows):
        assert row[-1] == following[0]
    return [rows[0][0], *itertools.chain(*(row[1:] for row in rows))]


def test_train_and_held_out_text_make_up_the_whole(book):
    config = describe(data_glob=str(book))
    text = open_text(config)
    whole = book.read_text()
    held_out = text.tokenizer.decode(joined(rows_of(text.held_out_batches())))
    assert whole.endswith(held_out)
    assert len(held_out) == pytest.approx(0.1 * len(whole), abs=1)
    tokens = text.tokenizer.encode(whole.removesuffix(held_out))
    count = (len(tokens) - 1) // LENGTH
    windows = [tuple(tokens[i * LENGTH : (i + 1) * LENGTH + 1]) for i in range(count)]
    with_full_batches = rows_of(take(text.train_batches(), count))[: 4 * count]
    epochs = [with_full_batches[i * count : (i + 1) * count] for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(windows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert text.description == (
        f"{count * LENGTH + 1:,} tokens to train on, "
        f"{len(text.tokenizer.encode(held_out)) + 1} held out, "
        f"vocabulary of {text.tokenizer.vocabulary_size}"
    )


def test_tokenizer_never_saw_the_held_out_text(tmp_path):
    (tmp_path / "text.txt").write_text("abcd " * 900 + "zyxw " * 100)
    tokenizer = open_text(describe(data_glob=f"{tmp_path}/*.txt")).tokenizer
    assert len(tokenizer.encode(" abcd")) == 1
    assert len(tokenizer.encode(" zyxw")) == 5


def test_held_out_batches_have_every_token_but_the_first_as_target(book):
    text = open_text(describe(data_glob=str(book)))
    batches = list(text.held_out_batches())
    check_form(batches)
    assert all(batch["mask"].all() for batch in batches[:-1])
    # The fixture leaves a rest, or the padding would go untested.
    assert not batches[-1]["mask"].all()
    assert joined(rows_of(batches))[-1] == text.tokenizer.end_of_text
    for first, second in zip(batches, text.held_out_batches(), strict=True):
        np.testing.assert_equal(first, second)


def test_packed_files_are_joined_by_an_end_of_text_each(lines):
    config = describe(data_glob=str(lines))
    text = open_text(dataclasses.replace(config, held_out_fraction=0.9))
    tokens = joined(rows_of(text.held_out_batches()))
    expected = []
    for document in random_documents(200, 10)[-150:]:
        expected += [*text.tokenizer.encode(document), text.tokenizer.end_of_text]
    assert tokens[-len(expected) :] == expected


def test_padded_documents_are_rows_cut_to_length(source, tokenizer_directory):
    config = describe("padded", **source)
    text = open_text(config, tokenizer_directory=tokenizer_directory)
    batches = take(text.train_batches(), 90)  # two epochs at most
    check_form(batches)
    rows = rows_of(batches)
    assert len(rows) == 360
    sizes = [40, 30, 50] if "dataset" in source else [200]
    wanted = set()
    for document in itertools.chain(*(random_documents(size, 10) for size in sizes)):
        ids = [*text.tokenizer.encode(document), text.tokenizer.end_of_text]
        wanted.add(tuple(ids[: LENGTH + 1]))
    assert {len(row) for row in wanted} == set(range(2, LENGTH + 2))
    if "dataset" in source:
        assert set(rows) == wanted
    else:  # the held-out part may begin within a document
        assert len(set(rows) - wanted) <= 1
        held_out = set(rows_of(text.held_out_batches()))
        assert len(wanted - set(rows) - held_out) <= 1


def test_padded_tokens_that_are_cut_off_are_not_counted(tmp_path, tokenizer_directory):
    write_rows(tmp_path / "a.jsonl", ["call me ishmael" * 5] * 50)
    config = describe("padded", data_glob=f"{tmp_path}/a.jsonl")
    reports = []
    options = {"tokenizer_directory": tokenizer_directory, "report": reports.append}
    text = open_text(config, **options)
    size = len(text.tokenizer.encode("call me ishmael" * 5)) + 1
    left_out = size - LENGTH - 1
    assert reports == [
        f"--packing padded leaves out {45 * left_out} of {45 * size} tokens to train "
        f"on: what documents have beyond {LENGTH + 1}"
    ]
    rows = rows_of(text.held_out_batches())
    assert f" {sum(map(len, rows))} held out" in text.description
    assert text.description.startswith(f"{45 * (LENGTH + 1)} tokens to train on")


def test_a_document_that_is_cut_off_has_no_end(tmp_path, tokenizer_directory):
    lines = [json.dumps({"text": "how never mind"})] * 40
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    config = describe("padded", data_glob=f"{tmp_path}/*.jsonl")
    config = dataclasses.replace(config, held_out_fraction=0.11)
    text = open_text(config, tokenizer_directory=tokenizer_directory)
    rows = set(rows_of(take(text.train_batches(), 9)))
    (cut,) = (row for row in rows if text.tokenizer.end_of_text not in row)
    assert "how never mind".startswith(text.tokenizer.decode(cut))
    assert len(rows) == 2


def test_documents_without_tokens_make_no_rows(tmp_path):
    """Text that BERT's tokenizer drops as control characters."""
    (tmp_path / "tokenizer.json").write_text(json.dumps({
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"[SEP]": 0, "me": 1}, "unk_token": ""},
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "lowercase": True,
                       "handle_chinese_chars": False, "strip_accents": False},
    }))  # fmt: skip
    for split in ("train", "validation"):
        lines = '{"text": "\\u0001"}\n{"text": "me"}\n' * 20
        (tmp_path / f"{split}.jsonl").write_text(lines)
    tokenizer = str(tmp_path / "tokenizer.json")
    for place in ({"data_glob": f"{tmp_path}/t*.jsonl"}, {"dataset": str(tmp_path)}):
        text = open_text(describe("padded", tokenizer=tokenizer, **place))
        batches = take(text.train_batches(), 4)
        assert rows_of(batches) == [(1, 0)] * 4 * ROWS


@pytest.mark.parametrize("count", [0, 1, 8, 9, 10, 17])
def test_packed_rows_predict_every_token_but_the_first(count):
    documents = [np.arange(count)[:5], np.arange(count)[5:]]
    rows = packing.Rows.cut(encoding.Documents.gather(documents), describe())
    assert rows.predicted.sum() == max(0, count - 1)
    assert (rows.predicted > 0).all()
    if count > 1:
        assert joined([tuple(rows[i]) for i in range(len(rows))]) == list(range(count))


def test_a_packed_stream_joins_the_documents_of_its_order(dataset, tokenizer_directory):
    config = describe(dataset=str(dataset), shuffle_buffer_documents=16)
    text = open_text(config, tokenizer_directory=tokenizer_directory)
    batches = take(text.train_batches(), 90)
    check_form(batches)
    assert all(batch["mask"].all() for batch in batches)
    tokens = joined(rows_of(batches))
    ends = np.flatnonzero(np.array(tokens) == text.tokenizer.end_of_text)
    assert len(ends) > 240
    read = [text.tokenizer.decode(part) for part in np.split(tokens, ends + 1)]
    documents = [text for size in (40, 30, 50) for text in random_documents(size, 10)]
    assert sorted(read[:120]) == sorted(read[120:240]) == sorted(documents)
    assert read[:120] != read[120:240]


def test_held_out_rows_of_a_dataset(dataset, tokenizer_directory):
    for kind in ("packed", "padded"):
        config = describe(kind, dataset=str(dataset))
        text = open_text(config, tokenizer_directory=tokenizer_directory)
        batches = list(text.held_out_batches())
        check_form(batches)
        tokens = [
            [*text.tokenizer.encode(document), text.tokenizer.end_of_text]
            for document in random_documents(33, 10)
        ]
        if kind == "packed":
            assert joined(rows_of(batches)) == list(itertools.chain(*tokens))
        else:
            assert rows_of(batches) == [tuple(ids[: LENGTH + 1]) for ids in tokens]
            assert len(batches) == 9


@pytest.mark.parametrize("eval_tokens", [1, 31, 32, 63, 64, 100])
def test_evaluations_are_bounded_in_whole_batches(
    config, tokenizer_directory, eval_tokens
):
    bounded = dataclasses.replace(config, eval_tokens=eval_tokens)
    options = {"tokenizer_directory": tokenizer_directory}
    some = list(open_text(bounded, **options).held_out_batches())
    every = list(open_text(config, **options).held_out_batches())
    predicted = np.cumsum([batch["mask"].sum() for batch in every])
    assert len(some) == max(1, np.count_nonzero(predicted <= eval_tokens)) < len(every)
    for one, other in zip(some, every, strict=False):
        np.testing.assert_equal(one, other)


def test_same_seed_same_batches(config, tokenizer_directory):
    options = {"tokenizer_directory": tokenizer_directory}
    one, two, other = (
        take(open_text(config, seed, **options).train_batches(), 5)
        for seed in (3, 3, 4)
    )
    for batch, again in zip(one, two, strict=True):
        np.testing.assert_equal(batch, again)
    assert rows_of(one) != rows_of(other)
    # Also for a text that is opened once.
    again = take(open_text(config, 4, **options).train_batches(3), 5)
    for batch, same in zip(one, again, strict=True):
        np.testing.assert_equal(batch, same)


def test_batches_go_on_exactly(config, tokenizer_directory):
    """Resumes from any position in the first epochs, also in new iterators."""
    options = {"tokenizer_directory": tokenizer_directory}
    batches = open_text(config, **options).train_batches()
    states, expected = [], []
    for _ in range(100):  # the dataset has some 70 batches to an epoch
        states.append(json.dumps(batches.get_state()))
        expected.append(next(batches))
    fresh = open_text(config, **options).train_batches()
    for position in [0, 1, 2, 3, *range(5, 96, 7)]:
        fresh.set_state(json.loads(states[position]))
        assert json.dumps(fresh.get_state()) == states[position]
        for batch in expected[position : position + 4]:
            np.testing.assert_equal(next(fresh), batch)
    batches.close()
    fresh.close()


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_epochs_count_passes_over_the_text(source, tokenizer_directory, packing):
    """A streamed dataset is read ahead, so only complete epochs are known."""
    text = open_text(
        describe(packing, **source), tokenizer_directory=tokenizer_directory
    )
    batches = text.train_batches()
    epochs, rows = [text.epoch(batches)], []
    while epochs[-1] < 2:
        rows += rows_of([next(batches)])
        epochs.append(text.epoch(batches))
    batches.close()
    assert epochs[0] == 0 and epochs == sorted(epochs)
    if "dataset" in source:
        assert set(epochs) == {0, 1, 2}
    else:
        np.testing.assert_allclose(np.diff(epochs), epochs[1])
        in_one = round(ROWS / epochs[1])
        assert len(set(rows)) == len(set(rows[:in_one])) > len(set(rows[: in_one - 9]))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_rows_of_files(lines, tokenizer_directory, count):
    for kind in ("packed", "padded"):
        config = describe(kind, data_glob=str(lines))
        options = {"tokenizer_directory": tokenizer_directory, "seed": 1}
        whole = open_text(config, **options)
        parts = [
            open_text(config, **options, process_index=i, process_count=count)
            for i in range(count)
        ]
        for read in (
            lambda text: take(text.train_batches(), 90),
            lambda text: list(text.held_out_batches()),
        ):
            for batch, *shares in zip(read(whole), *map(read, parts), strict=True):
                check_form(shares, rows=ROWS // count)
                for key, values in batch.items():
                    stacked = np.concatenate([share[key] for share in shares])
                    np.testing.assert_array_equal(stacked, values)


def test_processes_share_the_documents_of_a_dataset(dataset, tokenizer_directory):
    """With 3 files for 2 processes, each reads every other document."""
    config = describe("padded", dataset=str(dataset), shuffle_buffer_documents=16)
    read = []
    for index in range(2):
        text = open_text(
            config,
            tokenizer_directory=tokenizer_directory,
            process_index=index,
            process_count=2,
        )
        batches = take(text.train_batches(), 30)
        check_form(batches, rows=ROWS // 2)
        read += rows_of(batches)
        assert len(list(text.held_out_batches())) == 9
    whole = open_text(config, tokenizer_directory=tokenizer_directory)
    assert sorted(read) == sorted(rows_of(take(whole.train_batches(), 30)))


def test_a_saved_tokenizer_takes_the_place_of_any_other(source, tmp_path):
    config = describe(**source)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        open_text(config, tokenizer_directory=tmp_path)  # it is lost
    Tokenizer.train(["zyxw " * 100], 262).save(tmp_path)
    named = dataclasses.replace(config, tokenizer="/no/such/tokenizer.json")
    text = open_text(named, tokenizer_directory=tmp_path)
    assert text.tokenizer.vocabulary_size < 265
    assert max(batch["inputs"].max() for batch in text.held_out_batches()) < 265


def test_a_given_tokenizer_is_used(source, tokenizer_directory):
    config = describe(**source, tokenizer=str(tokenizer_directory / "tokenizer.json"))
    text = open_text(config)
    saved = Tokenizer.load(tokenizer_directory)
    assert text.tokenizer.encode("ishmael some") == saved.encode("ishmael some")
    with pytest.raises(ValueError, match=r"--tokenizer .*tokenizer.json\) has \d+ tok.*"
                       r"--vocabulary-size 260; give that at least"):  # fmt: skip
        data.open_text(config, 260, seed=0)
    with pytest.raises(ValueError, match=r"the one in .* has \d+ tokens, more than"):
        data.open_text(config, 260, seed=0, tokenizer_directory=tokenizer_directory)


def test_tokens_above_16_bits_are_kept(tmp_path):
    vocabulary = {"[SEP]": 70_000, **{word: 70_001 + i for i, word in enumerate(WORDS)}}
    rules = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[SEP]"}
    form = {"version": "1.0", "model": rules, "pre_tokenizer": {"type": "Whitespace"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(form))
    (tmp_path / "text.txt").write_text("call me some " * 100)
    config = describe(data_glob=f"{tmp_path}/*.txt", tokenizer=str(tmp_path))
    text = data.open_text(config, 70_100, seed=0)
    rows = rows_of(take(text.train_batches(), 2))
    assert set(itertools.chain(*rows)) == {70_001, 70_002, 70_004}


def test_many_documents_are_encoded_at_once(monkeypatch):
    sizes = []
    original = Tokenizer.train(WORDS, 280)
    encode_batch = original.encode_batch
    monkeypatch.setattr(encoding, "ENCODED_CHARACTERS", 100)
    monkeypatch.setattr(
        original, "encode_batch", lambda t: sizes.append(len(t)) or encode_batch(t)
    )
    pieces = [("some years ", False), ("ago", True)] * 30 + [("never", False)]
    tokens = list(encoding.encode(original, pieces))
    assert len(sizes) == 5 and sum(sizes) == 61
    assert [original.decode(one) for one in tokens] == ["some years ago"] * 30 + [
        "never"
    ]
    assert [one[-1] == original.end_of_text for one in tokens] == [True] * 30 + [False]


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def assert_same(text, other):
    for first, second in (
        (text.held_out_batches(), other.held_out_batches()),
        (take(text.train_batches(), 9), take(other.train_batches(), 9)),
    ):
        for batch, same in zip(first, second, strict=True):
            np.testing.assert_equal(batch, same)


def test_evaluation_has_text_of_its_own(tmp_path, source, tokenizer_directory):
    """With evaluation files, all training files are used and no split is needed."""
    evaluated = write_rows(tmp_path / "valid.jsonl", random_documents(21, 9))
    config = describe(eval_glob=str(evaluated), **source)
    reports = []
    options = {"tokenizer_directory": tokenizer_directory, "report": reports.append}
    text = open_text(config, **options)

    def encode(documents):
        end = text.tokenizer.end_of_text
        tokens = ([*text.tokenizer.encode(document), end] for document in documents)
        return list(itertools.chain(*tokens))

    held_out = joined(rows_of(text.held_out_batches()))
    assert held_out == encode(random_documents(21, 9))
    if "data_glob" in source:
        count = (len(encode(random_documents(200, 10))) - 1) // LENGTH
        assert text.description.startswith(f"{count * LENGTH + 1:,} tokens to train on")
    assert reports == ["--held-out-fraction 0.1 is not used: --eval-glob is given"]


def test_options_that_are_not_used_are_told(source, tokenizer_directory):
    fields = {"dataset_eval_split": "validation", "shuffle_buffer_documents": 16}
    options = {**source, **fields, "dataset_split": "train[:9]"}
    reports = []
    if "dataset" in source:
        del options["dataset_split"]
    open_text(
        describe(**options),
        tokenizer_directory=tokenizer_directory,
        report=reports.append,
    )
    assert reports == (
        ["--held-out-fraction 0.1 is not used: --dataset has --dataset-eval-split"]
        if "dataset" in source
        else [
            "--dataset-split train[:9] is not used: there is no --dataset",
            "--shuffle-buffer-documents 16 is not used: there is no --dataset",
        ]
    )


def test_files_that_are_evaluated_on_are_not_trained_on(tmp_path, tokenizer_directory):
    write_rows(tmp_path / "a.jsonl", ["call me"] * 50)
    write_rows(tmp_path / "valid.jsonl", ["never mind"] * 50)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "valid.jsonl")
    shutil.copy(tmp_path / "valid.jsonl", tmp_path / "copy.jsonl")
    reports = []
    options = {"tokenizer_directory": tokenizer_directory, "report": reports.append}
    config = DataConfig(data_glob=f"{tmp_path}/*l", eval_glob=f"{tmp_path}/v*")
    shape = {"sequence_length_tokens": LENGTH, "batch_size_sequences": ROWS}
    config = dataclasses.replace(config, **shape)
    text = open_text(config, **options)

    def read(batches):
        return "".join(map(text.tokenizer.decode, rows_of(batches)))

    assert "never" not in read(take(text.train_batches(), 9))
    assert "call" not in read(text.held_out_batches())
    assert len(reports) == 2
    assert "further names of the same files, left out (1)" in reports[0]
    assert "both match 2 files, or copies, which are not trained on" in reports[1]
    with pytest.raises(ValueError, match="match the same files: there are none to tr"):
        open_text(dataclasses.replace(config, data_glob=config.eval_glob), **options)
    with pytest.raises(ValueError, match="no file matches --eval-glob 'nothing'"):
        open_text(dataclasses.replace(config, eval_glob="nothing"), **options)


def test_a_text_is_tokenized_once(tmp_path, monkeypatch):
    """Cached tokens are used until the files or the settings change."""
    path = write_rows(tmp_path / "a.jsonl", random_documents(200, 10))
    evaluated = write_rows(tmp_path / "b.jsonl", random_documents(90, 10))
    for name, words in (("one", WORDS), ("two", WORDS[:3])):
        (tmp_path / name).mkdir()
        Tokenizer.train(words, 300).save(tmp_path / name)
    config = describe(
        data_glob=str(path),
        tokenizer=str(tmp_path / "one"),
        token_cache_dir=str(tmp_path),
    )
    encoded = []
    encode_pieces = encoding.encode_pieces
    monkeypatch.setattr(
        encoding, "encode_pieces", lambda *a: encoded.append(a) or encode_pieces(*a)
    )

    def is_tokenized(**options):
        encoded.clear()
        text = open_text(dataclasses.replace(config, **options))
        rows = rows_of(take(text.train_batches(), 5) + list(text.held_out_batches()))
        return bool(encoded), rows

    first = is_tokenized()
    assert first == (True, is_tokenized()[1])
    monkeypatch.setattr(sources, "read_file", None)  # nor are the files read again
    assert is_tokenized() == (False, first[1])
    assert not is_tokenized(packing="padded", sequence_length_tokens=4)[0]
    assert not is_tokenized(eval_tokens=99, batch_size_sequences=2)[0]
    monkeypatch.undo()
    monkeypatch.setattr(
        encoding, "encode_pieces", lambda *a: encoded.append(a) or encode_pieces(*a)
    )
    for change in (
        {"tokenizer": str(tmp_path / "two")},
        {"held_out_fraction": 0.2},
        {"data_glob": f"{tmp_path}/[ab].jsonl"},
        {"eval_glob": str(evaluated)},
        {"skip_bad_documents": True},
    ):
        assert is_tokenized(**change)[0], change
        assert not is_tokenized(**change)[0], change
    monkeypatch.setattr(sources, "FINGERPRINT_BLOCK_BYTES", 4)  # not what changes
    is_tokenized()
    assert not is_tokenized()[0]
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"call", b"some", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert is_tokenized()[0]
    path.touch()
    assert is_tokenized()[0]


def test_a_run_that_is_continued_reads_no_text(tmp_path, monkeypatch):
    """A new run, which trains a tokenizer, is also unaffected."""
    path = write_rows(tmp_path / "a.jsonl", random_documents(200, 10))
    config = describe(data_glob=str(path), token_cache_dir=str(tmp_path / "cache"))
    text = open_text(config)
    text.tokenizer.save(tmp_path)
    monkeypatch.setattr(sources, "read_file", None)
    assert_same(text, open_text(config))
    assert_same(text, open_text(config, tokenizer_directory=tmp_path))
    assert_same(text, open_text(dataclasses.replace(config, tokenizer=str(tmp_path))))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", random_documents(200, 10))
    train = Tokenizer.train

    def change_and_train(*arguments):
        found = train(*arguments)
        monkeypatch.setattr(
            found, "encode_batch", lambda texts: path.touch() or [[1]] * len(texts)
        )
        return found

    monkeypatch.setattr(Tokenizer, "train", change_and_train)
    with pytest.raises(OSError, match=r"a file changed while it was read, of .*a.json"):
        open_text(describe(data_glob=str(path)))


def test_what_is_skipped_is_told(tmp_path, tokenizer_directory):
    path = write_rows(tmp_path / "train.jsonl", random_documents(300, 10))
    lines = path.read_text().splitlines()
    lines[5:5] = ['{"text": 5}'] * 12
    path.write_text("\n".join([*lines, '{"te']))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff\xff")
    options = {"tokenizer_directory": tokenizer_directory}
    for pattern in ("t*.jsonl", "b*.txt"):
        config = describe(data_glob=f"{tmp_path}/{pattern}")
        with pytest.raises(ValueError, match=r"train.jsonl:6: f|bad.txt is not UTF"):
            open_text(config, **options)
    config = describe(data_glob=f"{tmp_path}/*", skip_bad_documents=True)
    for _ in range(2):  # the cache's notes are reported again
        reports = []
        open_text(config, report=reports.append, **options)
        assert reports[0].startswith("documents skipped (14): ")
    nothing = dataclasses.replace(config, data_glob=f"{tmp_path}/b*.txt")
    with pytest.raises(ValueError, match=r"no text in .*bad.txt; documents skipped"):
        open_text(nothing, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text in .*text.txt"),
        (" \n ", "no text in .*text.txt"),
        ("a few words", "too short: .* 0 seq.* give more text, a smaller --batch-siz"),
    ],
)
def test_useless_texts_are_refused(tmp_path, content, message):
    (tmp_path / "text.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_text(describe(data_glob=f"{tmp_path}/*.txt"))


def test_a_batch_that_cannot_be_shared_is_refused(source):
    with pytest.raises(
        ValueError, match=r"--batch-size-sequences 4 .* 3 processes; use"
    ):
        open_text(describe(**source), process_count=3)


def test_an_empty_evaluation_split_is_refused(tmp_path, tokenizer_directory):
    (tmp_path / "train.jsonl").write_text('{"text": "some"}\n')
    (tmp_path / "validation.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ValueError, match="--dataset-eval-split validation has no text"):
        open_text(
            describe(dataset=str(tmp_path)), tokenizer_directory=tokenizer_directory
        )
