"""Streamed documents: each appears once, and resumed streams continue exactly."""

import gzip
import itertools
import json
import sys

import datasets
import numpy as np
import pytest

from train.config.data_config import DataConfig
from train.data import streams

DOCUMENTS = [f"document {i}" for i in range(60)]


def write_lines(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Two splits in a directory, as on the hub; train in 4 files of 3 row groups."""
    directory = tmp_path_factory.mktemp("parquet")
    for part, texts in enumerate(np.array_split(np.array(DOCUMENTS), 4)):
        rows = {"text": [*texts.tolist(), " "], "url": ["somewhere"] * (len(texts) + 1)}
        path = directory / f"train-{part}.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(path, batch_size=6)
    rows = {"text": [None, "held out"], "url": [None, None]}
    datasets.Dataset.from_dict(rows).to_parquet(directory / "validation.parquet")
    return directory


C4_README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
- config_name: en.noblocklist
  data_files: en/*.json.gz
dataset_info:
- config_name: en
  features: &fields
  - {name: text, dtype: string}
  - {name: timestamp, dtype: string}
  - {name: url, dtype: string}
- config_name: en.noblocklist
  features: *fields
---
"""


@pytest.fixture(scope="module")
def json_lines(tmp_path_factory):
    """The same documents in C4's form: compressed JSON lines and a configuration."""
    directory = tmp_path_factory.mktemp("c4")
    (directory / "README.md").write_text(C4_README)
    (directory / "en").mkdir()
    for part, texts in enumerate(np.array_split(np.array(DOCUMENTS), 2)):
        path = directory / "en" / f"c4-train.0000{part}-of-00002.json.gz"
        rows = [{"text": t, "timestamp": "2019", "url": "a"} for t in texts.tolist()]
        write_lines(path, rows)
    return directory


@pytest.fixture(params=["parquet", "json_lines"])
def directory(request):
    return request.getfixturevalue(request.param)


def shuffled(directory, seed=0, window=7, index=0, count=1):
    config = DataConfig(
        dataset=str(directory),
        dataset_config="en" if (directory / "README.md").exists() else None,
        shuffle_buffer_documents=window,
    )
    stream = streams.open_stream(config, "train", "--dataset-split")
    return iter(streams.ShuffledStream(stream, config, seed, index, count))


def take(iterator, count=60):
    return list(itertools.islice(iterator, count))


def test_an_epoch_of_a_stream_has_every_document_once(directory):
    stream = shuffled(directory)
    epochs = [take(stream) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(DOCUMENTS)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_stream_is_shuffled_by_files_and_within_windows(parquet):
    order = [DOCUMENTS.index(text) for text in take(shuffled(parquet, window=5))]
    files = [i // 15 for i in order]
    assert sorted(set(files), key=files.index) != [0, 1, 2, 3]
    for start in range(0, 60, 5):
        window = order[start : start + 5]
        assert sorted(window) == list(range(min(window), min(window) + 5))
    offsets = np.array(order).reshape(-1, 5) % 5
    assert len({tuple(window) for window in offsets}) > 6


def test_the_seed_alone_decides_the_order_of_a_stream(parquet):
    one, two, other = (take(shuffled(parquet, seed), 150) for seed in (3, 3, 4))
    assert one == two != other
    first_files = {take(shuffled(parquet, seed, window=1), 1)[0] for seed in range(20)}
    assert len(first_files) == 4


def test_the_seed_decides_the_order_within_a_window(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": text} for text in DOCUMENTS])
    one, other = (take(shuffled(tmp_path, seed, window=60)) for seed in (3, 4))
    assert sorted(one) == sorted(other)
    assert one != other


@pytest.mark.parametrize(("index", "count"), [(0, 1), (1, 2), (2, 3)])
def test_a_stream_goes_on_exactly(directory, index, count):
    """Also at ends of windows, files and epochs; 7 divides none of their sizes."""
    options = {"index": index, "count": count}
    stream = shuffled(directory, **options)
    states, texts = [], []
    for _ in range(2 * len(DOCUMENTS)):
        states.append(stream.get_state())
        texts.append(next(stream))
    fresh = shuffled(directory, **options)
    for position in range(0, len(texts), 1 if count == 1 else 5):
        fresh.set_state(json.loads(json.dumps(states[position])))
        assert fresh.get_state() == states[position]
        expected = texts[position : position + 20]
        assert take(fresh, len(expected)) == expected


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_share_a_stream(directory, count):
    """Entire files if they divide evenly, otherwise every n-th document."""
    parts = [shuffled(directory, index=i, count=count) for i in range(count)]
    share = len(DOCUMENTS) // count
    # Blank rows count, so shares may differ slightly.
    texts = [take(part, share - 2) for part in parts]
    joined = list(itertools.chain(*texts))
    assert len(set(joined)) == len(joined)


def test_text_of_a_split(parquet):
    config = DataConfig(dataset=str(parquet))
    stream = streams.open_stream(config, "validation", "--dataset-eval-split")
    assert list(streams.read_stream(stream, "text")) == ["held out"]


BAD_DATASETS = [
    ({}, "test", ValueError, r"--dataset-split test: Bad split: test. .*'validation'"),
    ({"dataset_config": "en"}, "train", ValueError, r"--dataset-config en .*'default'"),
    ({"text_field": "a"}, "train", ValueError, r"no field 'a', only 'text', 'url'; "),
    ({"dataset": "/no/such"}, "train", OSError, r"cannot open --dataset /no/such --"),
]


@pytest.mark.parametrize(("options", "split", "kind", "message"), BAD_DATASETS)
def test_wrong_datasets_are_refused(parquet, options, split, kind, message):
    config = DataConfig(**{"dataset": str(parquet), **options})
    with pytest.raises(kind, match=message) as raised:
        streams.open_stream(config, split, "--dataset-split")
    assert "\n" not in str(raised.value)


def test_a_missing_configuration_is_named(json_lines):
    config = DataConfig(dataset=str(json_lines))
    with pytest.raises(ValueError, match=r"'en', 'en.noblocklist'") as raised:
        streams.open_stream(config, "train", "--dataset-split")
    assert "\n" not in str(raised.value)


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = DataConfig(dataset="allenai/c4", dataset_config="en")
    with pytest.raises(
        OSError, match="--dataset allenai/c4 --dataset-config en"
    ) as raised:
        streams.open_stream(config, "train", "--dataset-split")
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets: pip install"):
        streams.open_stream(
            DataConfig(dataset=str(parquet)), "train", "--dataset-split"
        )


def test_empty_and_broken_datasets_are_refused(tmp_path):
    blank = tmp_path / "blank"
    blank.mkdir()
    write_lines(blank / "train.jsonl", [{"text": " "}] * 3)
    with pytest.raises(OSError, match="no text for this process"):
        next(shuffled(blank))
    rows = [{"text": "a"}, {"other": 3}, {"text": "b"}]
    broken = datasets.IterableDataset.from_generator(lambda: iter(rows))
    documents = streams.read_stream(broken, "text")
    assert next(documents) == "a"
    with pytest.raises(OSError, match=r"cannot read row 1 of the dataset: .*'text'"):
        next(documents)
    reasons = []
    assert list(streams.read_stream(broken, "text", reasons.append)) == ["a", "b"]
    assert len(reasons) == 1 and "row 1 of the dataset: it has no field" in reasons[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.jsonl", b"", "is empty"),
        (
            "train.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-9],
            "ended before the end",
        ),
    ],
)
def test_files_that_cannot_be_opened_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    config = DataConfig(dataset=str(tmp_path))
    with pytest.raises(ValueError, match=f"--dataset-split train.*{message}"):
        streams.open_stream(config, "train", "--dataset-split")


def write_damaged(directory):
    """Three files; one has a line that is not JSON."""
    write_lines(directory / "train-0.jsonl", [{"text": "a"}, {"text": "b"}])
    (directory / "train-1.jsonl").write_text('{"text": "c"}\n{"te\n{"text": "d"}\n')
    write_lines(directory / "train-2.jsonl", [{"text": "e"}, {"text": "f"}])


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_of_a_stream_that_cannot_be_parsed_are_skipped(tmp_path, is_first, count):
    write_damaged(tmp_path)
    if is_first:
        (tmp_path / "train-0.jsonl").rename(tmp_path / "train-3.jsonl")
    config = DataConfig(dataset=str(tmp_path), skip_bad_documents=True)
    stream = streams.open_stream(config, "train", "--dataset-split")
    found, reasons = [], []
    for index in range(count):
        part = streams.ShuffledStream(stream, config, 0, index, count, reasons.append)
        rows = streams.read_stream(part.split_for_process(), "text", reasons.append)
        found += rows
    assert sorted(found) == ["a", "b", "e", "f"]
    assert reasons
    assert all("nor is the rest of its file read" in reason for reason in reasons)
    with pytest.raises(OSError, match="cannot read row"):
        list(streams.read_stream(stream, "text"))


def test_a_stream_with_bad_documents_goes_on_exactly(tmp_path):
    write_damaged(tmp_path)
    config = DataConfig(
        dataset=str(tmp_path), skip_bad_documents=True, shuffle_buffer_documents=3
    )

    def begin():
        stream = streams.open_stream(config, "train", "--dataset-split")
        return iter(streams.ShuffledStream(stream, config, 0, 0, 1, lambda why: None))

    stream, states, texts = begin(), [], []
    for _ in range(20):
        states.append(stream.get_state())
        texts.append(next(stream))
    assert sorted(texts[:4]) == sorted(texts[4:8]) == ["a", "b", "e", "f"]
    fresh = begin()
    for position, state in enumerate(states):
        fresh.set_state(json.loads(json.dumps(state)))
        assert take(fresh, 20 - position) == texts[position:]


def test_a_wrong_field_is_no_bad_document(parquet):
    config = DataConfig(dataset=str(parquet), text_field="a", skip_bad_documents=True)
    with pytest.raises(ValueError, match=r"no field 'a', only 'text', 'url'; "):
        streams.open_stream(config, "train", "--dataset-split")


def test_a_stream_that_broke_off_can_be_asked_again(parquet, monkeypatch):
    expected = take(shuffled(parquet), 40)
    stream = shuffled(parquet)
    read_stream = streams.read_stream
    stops = iter([10, 3])  # in the second window, and again when it is retried

    def break_off(*arguments):
        yield from itertools.islice(read_stream(*arguments), next(stops))
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(streams, "read_stream", break_off)
        texts = take(stream, 7)
        for _ in range(2):
            with pytest.raises(OSError, match="connection reset"):
                next(stream)
    assert texts + take(stream, 33) == expected
