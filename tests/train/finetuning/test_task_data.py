"""Rows of a task: sources, labels by name, held-out rows, encoded pairs."""

import collections
import csv
import json

import numpy as np
import pytest

from models.encoder_config import EncoderConfig
from tests.train.finetuning.common import sentiment_rows, write_rows, write_tokenizer
from train.config.task_data_config import TaskDataConfig
from train.config.tasks import TASKS, find_task
from train.data.row_files import read_rows
from train.finetuning import examples, labels, tables, task_data
from train.tokenization.pairs import PairTokenizer

MODEL = EncoderConfig("bert", 40, 8, 16, 1, 1, 64, 2, 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    write_tokenizer(directory)
    return directory


def opened(weights, model=MODEL, *, new_head=False, seed=0, length=32, **settings):
    """The data, and the warnings."""
    reports = []
    data = TaskDataConfig(max_length_tokens=length, **settings)
    tokenizer = PairTokenizer(weights, length)
    found = task_data.open_data(
        data, model, tokenizer, seed, new_head=new_head, report=reports.append
    )
    return found, reports


def ids_of(split):
    return [split.tokens[split.input(i)].tolist() for i in range(len(split.ends))]


def test_a_tenth_of_each_class_is_held_out(weights, tmp_path):
    rows = sentiment_rows(100)[10:]  # 40 positive, 50 negative
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found, reports = opened(weights, task="sst2", train_file=str(path))
    (held_out,) = found.validation
    assert collections.Counter(held_out.labels.tolist()) == {0: 5, 1: 4}
    assert collections.Counter(found.train.labels.tolist()) == {0: 45, 1: 36}
    assert found.classes == ("negative", "positive")
    assert not found.test
    assert not reports
    everything = sorted(found.train.indices + held_out.indices)
    assert everything == list(range(90))
    again, _ = opened(weights, task="sst2", train_file=str(path))
    assert again.validation[0].indices == held_out.indices
    other, _ = opened(weights, task="sst2", train_file=str(path), seed=1)
    assert other.validation[0].indices != held_out.indices


def test_pairs_are_arranged_by_the_tokenizer_and_truncated_longer_first(weights):
    tokenizer = PairTokenizer(weights, 9)
    short, pair, long = tokenizer.encode(
        [("a cat", None), ("a cat", "[SEP] dog"), ("a cat", "the dog ran and sat .")]
    )
    assert short.ids == [2, 5, 15, 3]
    # Text is no special token, though it spells one.
    assert pair.ids[:4] == [2, 5, 15, 3]
    assert 3 not in pair.ids[4:-1]
    assert pair.types == [0] * 4 + [1] * (len(pair.ids) - 4)
    assert long.ids[:7] == [2, 5, 15, 3, 4, 16, 18]
    assert len(long.ids) == 9
    assert [each.is_truncated for each in (short, pair, long)] == [False, False, True]


def test_truncated_rows_are_counted(weights, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sentiment_rows(40))
    _, reports = opened(weights, length=7, task="sst2", train_file=str(path))
    assert reports == [
        "18 of 36 rows of train were truncated to --max-length-tokens 7",
        "2 of 4 rows of held out were truncated to --max-length-tokens 7",
    ]


def test_labels_are_known_by_name_whatever_the_order_of_the_head(weights, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", sentiment_rows(40))
    by_name, _ = opened(weights, task="sst2", train_file=str(path))
    model = EncoderConfig(
        *("bert", 40, 8, 16, 1, 1, 64, 2, 0), labels=("positive", "negative")
    )
    other, _ = opened(weights, model, task="sst2", train_file=str(path))
    assert other.classes == ("positive", "negative")
    assert (other.train.labels == 1 - by_name.train.labels).all()
    names = [found.answers(found.train.labels) for found in (by_name, other)]
    assert names[0] == names[1]
    new, _ = opened(weights, model, new_head=True, task="sst2", train_file=str(path))
    assert new.classes == ("negative", "positive")


@pytest.mark.parametrize(
    ("task", "value", "name"),
    [
        ("cb", 1, "contradiction"),  # MNLI's second class is neutral
        ("mnli", 1, "neutral"),
        ("rte", "not_entailment", "not_entailment"),
        ("boolq", True, "True"),
        ("boolq", "false", "False"),
        ("sst2", "1", "positive"),
        ("sst2", -1, None),
        ("sst2", None, None),
        ("custom", 3, "3"),
        ("custom", "sports", "sports"),
    ],
)
def test_numbers_and_words_of_a_label_are_names(task, value, name):
    table = tables.Table([{"label": value}], {})
    assert labels.class_names(table, find_task(task), "x") == [name]


def test_the_names_of_a_dataset_come_before_those_of_the_task():
    table = tables.Table([{"label": 0}], {"label": ("positive", "negative")})
    assert labels.class_names(table, find_task("sst2"), "x") == ["positive"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2, "row 2 of here: label 2 is not one of the 2 classes negative, positive"),
        ("fine", "label 'fine' is not one of negative, positive"),
        (0.5, "label 0.5 is a number with decimals where classes are"),
        (float("nan"), r"label nan is missing \(NaN\)"),
        ([1], "label .1. is list, not a class"),
    ],
)
def test_other_labels_are_refused(value, message):
    table = tables.Table([{"label": 0}, {"label": value}], {})
    with pytest.raises(ValueError, match=message):
        labels.class_names(table, find_task("sst2"), "here")


def test_numbers_to_predict_are_finite(tmp_path):
    task = find_task("stsb")
    table = tables.Table([{"label": 2}, {"label": "4.5"}, {"label": -1.0}], {})
    found = labels.numbers(table, task, "x")
    np.testing.assert_array_equal(found, np.array([2, 4.5, np.nan], np.float32))
    for bad in ("high", float("nan"), True and [1]):
        with pytest.raises(ValueError, match="is no finite number"):
            labels.numbers(tables.Table([{"label": bad}], {}), task, "x")


def refused(weights, tmp_path, rows, message, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises((ValueError, OSError), match=message):
        opened(weights, train_file=str(path), **settings)


def test_unusable_rows_are_refused_by_their_number(weights, tmp_path):
    rows = sentiment_rows(20)
    refuse = lambda rows, message, **settings: refused(
        weights, tmp_path, rows, message, **settings
    )
    refuse([{"text": "a", "label": 0}], "no field 'sentence', only 'text'", task="sst2")
    refuse(rows, "give --text-field, .*: the rows have 'sentence', 'label'")
    unlabelled = [*rows, {"sentence": "a"}]
    refuse(unlabelled, "row 21 of .* has no field 'label', only", task="sst2")
    hidden = [*rows, {"sentence": "a", "label": -1}]
    refuse(hidden, "row 21 of .* has no label: label is -1", task="sst2")
    one = [{"sentence": "a", "label": "x"}] * 9
    refuse(one, "all labels .* are 'x'", task="custom", text_field="sentence")
    refuse([], "rows.jsonl has no rows to train on", task="sst2")
    refuse(rows[9:11], "2 rows are too few to hold out", task="sst2")
    three = EncoderConfig(
        *("bert", 40, 8, 16, 1, 1, 64, 2, 0), labels=("no", "maybe", "yes")
    )
    refuse(
        *(rows, "the head of --init-from has the classes no, maybe, yes, the rows"),
        model=three,
        task="sst2",
    )


def test_a_class_without_rows_is_told_or_refused(weights, tmp_path):
    rows = [{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}] * 5
    train = write_rows(tmp_path / "train.jsonl", rows)
    test = write_rows(tmp_path / "test.jsonl", [{"sentence": "c", "label": "z"}])
    settings = {"text_field": "sentence", "train_file": str(train)}
    with pytest.raises(ValueError, match=r"row 1 of --test-file .*: class 'z'"):
        opened(weights, test_file=str(test), **settings)
    one = write_rows(tmp_path / "one.jsonl", sentiment_rows(20)[:10])
    _, reports = opened(weights, task="sst2", train_file=str(one))
    assert reports == [
        "no row to train on is of class negative: the model will not learn to predict "
        "it"
    ]


def test_without_data_the_three_ways_to_get_some_are_named(weights):
    with pytest.raises(ValueError, match=r"--task mrpc.*--dataset.*--train-file"):
        opened(weights)
    with pytest.raises(ValueError, match="--validation-file needs --train-file"):
        opened(weights, validation_file="x.jsonl")
    with pytest.raises(ValueError, match="--task axb only evaluates models: train one"):
        opened(weights, task="axb")


def test_fields_that_do_not_fit_the_task_are_refused():
    with pytest.raises(ValueError, match="--pair-field b: --task cola is of single"):
        _ = TaskDataConfig(task="cola", pair_field="b").chosen_task
    with pytest.raises(ValueError, match="--task copa builds its input from"):
        _ = TaskDataConfig(task="copa", text_field="b").chosen_task
    with pytest.raises(ValueError, match=r"unknown 'colo' \(did you mean cola\?\)"):
        TaskDataConfig(task="colo")
    task = TaskDataConfig(task="rte", text_field="a", label_field="y").chosen_task
    assert (task.fields, task.label_field) == (("a", "sentence2"), "y")


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_rows_are_read_from_each_form(tmp_path, form):
    rows = [{"text": 'a "b", c', "label": "1"}, {"text": "d\\e", "label": "0"}]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        write_rows(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif form == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    elif form == "tsv":
        path.write_text(
            "text\tlabel\n" + "".join("\t".join(r.values()) + "\n" for r in rows)
        )
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    assert read_rows(path, "--train-file x").rows == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a":', r"a.jsonl:2 is not JSON.*the 1 rows before it"),
        ("a.json", '[{"a": 1}, {"a"', r"item 2 is not JSON: .*the 1 rows before"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a.jsonl:2 is no JSON object"),
        ("a.csv", "a,b\n1,2\n3\n", r"line 3, has another number of cells than the 2"),
        ("a.parquet", "PAR1", "cannot read .*a.parquet"),
        (
            "a.xlsx",
            "x",
            "--train-file x is of no known form: rows are read from .jsonl",
        ),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        read_rows(path, "--train-file x")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_rows(tmp_path / "gone.csv", "--train-file x")


def test_a_directory_in_the_layout_of_the_hub_is_read(weights, tmp_path):
    import datasets

    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["negative", "positive"]),
    )
    target = tmp_path / "glue" / "sst2"
    target.mkdir(parents=True)
    hidden = [row | {"label": -1} for row in sentiment_rows(4)]
    for split, rows in {
        "train": sentiment_rows(20),
        "validation": sentiment_rows(6),
        "test": hidden,
    }.items():
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(target / f"{split}-00000-of-00001.parquet")
    found, _ = opened(weights, task="sst2", dataset=str(tmp_path / "glue"))
    assert (len(found.train), len(found.validation[0])) == (20, 6)
    assert found.test == ()  # its labels are hidden
    assert found.source == f"{tmp_path / 'glue'}, sst2"
    mnli = tmp_path / "glue" / "mnli"
    mnli.mkdir()
    row = {"premise": "a cat", "hypothesis": "a dog"}
    for split, count in {"train": 9, "validation_matched": 4}.items():
        rows = [row | {"label": i % 3} for i in range(count)]
        write_rows(mnli / f"{split}.jsonl", rows)
    write_rows(mnli / "validation_mismatched.jsonl", [row | {"label": "neutral"}])
    found, _ = opened(weights, task="mnli", dataset=str(tmp_path / "glue"))
    sizes = {split.name: len(split) for split in found.validation}
    assert sizes == {"validation_matched": 4, "validation_mismatched": 1}
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"has no files named by a split, .*train"):
        opened(weights, task="sst2", dataset=str(empty))
    script = tmp_path / "script"
    script.mkdir()
    (script / "README.md").write_text("")
    (script / "script.py").write_text("")
    with pytest.raises(ValueError, match="loading scripts are not run: give --dataset"):
        opened(weights, task="boolq", dataset=str(script))
    with pytest.raises((ValueError, OSError), match="cannot open --dataset"):
        opened(weights, task="custom", dataset=str(tmp_path / "empty" / "x"))


def texts(task, *rows):
    return examples.inputs(rows, TASKS[task], "x").texts


def test_special_forms_put_into_words_what_a_row_asks():
    premise = {"premise": "It fell.", "choice1": "A.", "choice2": "B."}
    assert texts("copa", premise | {"question": "cause"}) == [
        ("It fell. What was the cause?", "A."),
        ("It fell. What was the cause?", "B."),
    ]
    row = {"word": "bank", "sentence1": "A bank.", "sentence2": "Two banks."}
    assert texts("wic", row) == [("bank: A bank.", "Two banks.")]
    row = {"paragraph": "P.", "question": "Q?", "answer": "A"}
    assert texts("multirc", row) == [("P.", "Q? A")]
    row = {"text": "Mark told Pete he left", "span1_text": "Mark", "span2_text": "he"}
    row |= {"span1_index": 0, "span2_index": 3}
    assert texts("wsc", row) == [('"Mark" told Pete "he" left', None)]
    with pytest.raises(ValueError, match=r"row 1 of x has no field 'word'.*--task wic"):
        texts("wic", {})
    with pytest.raises(ValueError, match="question 'why' is not cause or effect"):
        texts("copa", premise | {"question": "why"})


def test_rows_of_a_question_and_pairs_of_genders_are_groups():
    index = {"paragraph": 0, "question": 2, "answer": 1}
    assert examples.groups([{"idx": index}], TASKS["multirc"]) == [(0, 2)]
    pairs = [{"idx": 4}, {"idx": 5}, {"idx": 6}, {"idx": 7, "pair_id": 9}]
    assert examples.groups(pairs, TASKS["axg"]) == [2, 2, 3, 9]
    assert examples.groups(pairs, TASKS["rte"]) is None


def test_candidates_of_a_choice_stay_together(weights, tmp_path):
    row = {"premise": "the cat sat", "question": "cause", "choice1": "a dog ran"}
    rows = [row | {"choice2": "the film", "label": i % 2} for i in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found, _ = opened(weights, task="copa", train_file=str(path))
    assert found.train.candidates == 2
    assert len(found.train) == 18
    assert len(ids_of(found.train)) == 36
    (held_out,) = found.validation
    first, second = ids_of(held_out)[:2]
    assert len(first) > len(second)
    assert held_out.lengths[0] == len(first)
