"""Submission files in the benchmarks' own formats; tables of results."""

import json

import pytest

from train.config.tasks import TASKS
from train.finetuning import results_table
from train.finetuning.submission import content, file_name


def lines(task, indices, predictions, split="test"):
    name = file_name(TASKS[task], split)
    return name, content(TASKS[task], name, indices, predictions).splitlines()


@pytest.mark.parametrize(
    ("task", "prediction", "name", "line"),
    [
        ("cola", "acceptable", "CoLA.tsv", "5\t1"),
        ("mnli", "neutral", "predictions.tsv", "5\tneutral"),
        ("wnli", "not_entailment", "WNLI.tsv", "5\t0"),
        ("ax", "contradiction", "AX.tsv", "5\tcontradiction"),
        ("stsb", 6.2, "STS-B.tsv", "5\t5.0"),
        ("stsb", -0.1, "STS-B.tsv", "5\t0.0"),
        ("custom-regression", 6.2, "predictions.tsv", "5\t6.2"),
        ("boolq", "False", "BoolQ.jsonl", '{"idx": 5, "label": "false"}'),
        ("wic", "True", "WiC.jsonl", '{"idx": 5, "label": "true"}'),
        ("wsc", "True", "WSC.jsonl", '{"idx": 5, "label": "True"}'),
        ("copa", "choice2", "COPA.jsonl", '{"idx": 5, "label": 1}'),
        ("cb", "neutral", "CB.jsonl", '{"idx": 5, "label": "neutral"}'),
        (
            "superglue-rte",
            "entailment",
            "RTE.jsonl",
            '{"idx": 5, "label": "entailment"}',
        ),
        ("axg", "entailment", "AX-g.jsonl", '{"idx": 5, "label": "entailment"}'),
    ],
)
def test_files_are_named_and_written_as_the_benchmark_wants(
    task, prediction, name, line
):
    found, written = lines(task, [5], [prediction])
    assert found == name
    if name.endswith(".tsv"):
        assert written == ["index\tprediction", line]
    else:
        assert written == [line]


def test_mnli_has_a_file_for_each_of_its_test_sets():
    names = [file_name(TASKS["mnli"], split) for split in TASKS["mnli"].test]
    assert names == ["MNLI-m.tsv", "MNLI-mm.tsv"]


def test_answers_are_nested_in_questions_and_paragraphs():
    indices = [
        {"paragraph": p, "question": q, "answer": a}
        for p, q, a in [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3)]
    ]
    _, written = lines("multirc", indices, ["True", "False", "False", "True"])
    first, second = map(json.loads, written)
    assert first == {
        "idx": 0,
        "passage": {
            "questions": [
                {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                {"idx": 1, "answers": [{"idx": 2, "label": 0}]},
            ]
        },
    }
    assert second["idx"] == 1


RESULTS = {
    **{"task": "sst2", "source": "a", "init_from": "m", "metric": "accuracy"},
    **{"optimizer": "subtrack", "rank": 8, "learning_rate": 1e-4, "freeze": "none"},
    **{"best": 0.8, "last": 0.7, "steps": 9, "majority": 0.5, "seed": 0},
    **{"test": {"test": {"loss": 1.0, "accuracy": 0.75}}, "state_bytes": 2**21},
    **{"examples_per_second": 10.0, "settings": {"b1": 0.9}},
    **{"update_seconds": 0.0125},
}


def test_seeds_are_averaged_and_sources_kept_apart():
    frozen = {"optimizer": "adamw", "rank": None, "freeze": "matrices", "test": {}}
    runs = [
        RESULTS,
        RESULTS | {"seed": 1, "best": 0.9},
        RESULTS | frozen,
        RESULTS | {"settings": {"b1": 0.8, "moments_dtype": "int8"}},
        RESULTS | {"source": "b"},
    ]
    first, second = results_table.table(runs).split("\n\nsst2, rows of b")
    assert first.startswith("sst2, rows of a, m; majority class 50.00")
    _, _, ours, theirs, other = first.splitlines()[2:]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells == [
        *("subtrack", "8", "0.0001", "9", "85.00 ± 7.07", "70.00", "75.00"),
        *("2", "2.0", "10", "12.5"),
    ]
    assert "adamw, matrices frozen" in theirs
    assert "subtrack, int8 moments" in other
    assert len(second.splitlines()) == 5
